"""Statistics against closed forms, properties, and the coverage of the interval on data with a known answer."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from mmalign.evaluation.statistics import bootstrap_mean, paired_comparison, seed_matrix, wins


def test_known_values() -> None:
    before = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    after = [[2.0, 2.0], [2.0, 5.0], [6.0, 7.0], [7.0, 8.0]]
    result = paired_comparison(before, after)
    assert result.mean_before == 4.5
    assert result.mean_after == pytest.approx(39 / 8)
    assert result.mean_difference == pytest.approx(3 / 8)
    assert result.median_difference == pytest.approx(0.25)  # prompt means: .5, 0, 1, 0
    assert result.win_rate == pytest.approx((0.75 + 0.5 + 1.0 + 0.5) / 4)
    assert result.tie_share == pytest.approx(3 / 8)
    assert (result.n_prompts, result.n_seeds, result.n_valid, result.n_invalid) == (4, 2, 8, 0)
    assert result.interval[0] <= result.win_rate <= result.interval[1]


def test_ties_count_half() -> None:
    assert wins([1, 1, 1], [2, 1, 0]).tolist() == [1.0, 0.5, 0.0]
    assert wins([1, 1, 1], [2, 1, 0], higher_is_better=False).tolist() == [0.0, 0.5, 1.0]
    same = np.arange(12.0).reshape(4, 3)
    result = paired_comparison(same, same)
    assert (result.win_rate, result.tie_share, result.mean_difference) == (0.5, 1.0, 0.0)
    assert result.interval == (0.5, 0.5)
    assert result.verdict == "undecided"


def test_exchanging_sides_mirrors_everything() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(30, 4)), rng.normal(0.2, size=(30, 4))
    forward, backward = paired_comparison(before, after), paired_comparison(after, before)
    assert forward.win_rate == pytest.approx(1 - backward.win_rate)
    assert forward.mean_difference == pytest.approx(-backward.mean_difference)
    assert forward.interval[0] == pytest.approx(1 - backward.interval[1], abs=0.01)
    lower = paired_comparison(before, after, higher_is_better=False)
    assert lower.win_rate == pytest.approx(1 - forward.win_rate)
    assert lower.mean_difference == pytest.approx(forward.mean_difference)


def test_order_of_prompts_and_seeds_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.normal(size=(25, 3)), rng.normal(0.1, size=(25, 3))
    reference = paired_comparison(before, after)
    rows = rng.permutation(25)
    assert paired_comparison(before[rows], after[rows]) == reference
    columns = [2, 0, 1]
    shuffled = paired_comparison(before[:, columns], after[:, columns])
    assert shuffled.interval == pytest.approx(reference.interval)
    assert shuffled.mean_difference == pytest.approx(reference.mean_difference)


def test_invalid_pairs_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.normal(size=(10, 2)), rng.normal(size=(10, 2))
    kept = paired_comparison(before[:8], after[:8])
    before[8, :] = np.nan
    after[9, :] = np.inf
    result = paired_comparison(before, after)
    assert (result.n_prompts, result.n_valid, result.n_invalid) == (8, 16, 4)
    for name in ("mean_before", "mean_after", "mean_difference", "win_rate", "interval", "mean_difference_interval"):
        assert getattr(result, name) == getattr(kept, name), name
    # A side without its partner must not enter the other side's mean.
    half = paired_comparison([[1.0, 100.0]], [[2.0, np.nan]])
    assert (half.mean_before, half.mean_after, half.win_rate) == (1.0, 2.0, 1.0)


def test_a_prompt_weighs_the_same_however_many_of_its_images_are_valid() -> None:
    before = np.zeros((2, 4))
    after = np.array([[1.0, 1, 1, 1], [-1.0, np.nan, np.nan, np.nan]])
    assert paired_comparison(before, after).win_rate == 0.5


def test_without_any_valid_pair_nothing_is_claimed() -> None:
    result = paired_comparison(np.full((3, 2), np.nan), np.zeros((3, 2)))
    assert math.isnan(result.win_rate)
    assert math.isnan(result.interval[0])
    assert (result.n_prompts, result.n_valid, result.n_invalid) == (0, 0, 6)
    assert result.verdict == "undecided"


@pytest.mark.parametrize("num_prompts", [1, 5, 54])
def test_unanimous_prompts_get_the_exact_binomial_interval(num_prompts: int) -> None:
    result = paired_comparison(np.zeros(num_prompts), np.ones(num_prompts))
    assert result.win_rate == 1
    # P(all win) under this win rate is 2.5 %.
    assert result.interval[0] ** num_prompts == pytest.approx(0.025)
    assert result.interval[1] == 1
    lost = paired_comparison(np.ones(num_prompts), np.zeros(num_prompts))
    assert lost.interval == pytest.approx((0.0, 1 - result.interval[0]))


def test_one_prompt_gives_no_interval() -> None:
    result = paired_comparison([[0.0, 0.0]], [[1.0, -1.0]])
    assert result.interval == (0.0, 1.0)
    assert math.isnan(result.mean_difference_interval[0])


def test_interval_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(0.3, 1.0, size=400)
    result = paired_comparison(np.zeros(400), difference)
    half = 1.96 * difference.std() / math.sqrt(400)
    assert result.mean_difference_interval == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=0.01
    )
    share = result.win_rate
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert result.interval == pytest.approx((share - half, share + half), abs=0.01)


def test_seeds_of_a_prompt_are_clustered() -> None:
    """Copies of the same image add no evidence: the interval stays as wide as with one seed."""
    rng = np.random.default_rng(4)
    before, after = rng.normal(size=(40, 1)), rng.normal(size=(40, 1))
    one = paired_comparison(before, after)
    eight = paired_comparison(np.repeat(before, 8, axis=1), np.repeat(after, 8, axis=1))
    assert eight.interval == pytest.approx(one.interval)


def test_interval_covers_the_truth_with_clustered_prompts() -> None:
    """54 prompts × 4 seeds with a prompt effect: the true win rate lies inside in about 95 % of repetitions."""
    rng = np.random.default_rng(5)
    true_rate = 0.6554  # Φ(0.4): the difference is N(0.4 σ, σ²) with σ² = 1 + 1
    trials, covered_rate, covered_mean, covered_naive = 400, 0, 0, 0
    for trial in range(trials):
        effect = rng.normal(0.4 * math.sqrt(2), 1.0, size=(54, 1))
        difference = effect + rng.normal(size=(54, 4))
        result = paired_comparison(np.zeros_like(difference), difference, num_resamples=1000, seed=trial)
        covered_rate += result.interval[0] <= true_rate <= result.interval[1]
        low, high = result.mean_difference_interval
        covered_mean += low <= 0.4 * math.sqrt(2) <= high
        naive = paired_comparison(np.zeros(54 * 4), difference.ravel(), num_resamples=300, seed=trial)
        covered_naive += naive.interval[0] <= true_rate <= naive.interval[1]
    assert 0.91 <= covered_rate / trials <= 0.98
    assert 0.91 <= covered_mean / trials <= 0.98
    # What goes wrong otherwise: images taken as independent are far too sure of themselves.
    assert covered_naive / trials < 0.88


def test_seeded_and_fast() -> None:
    rng = np.random.default_rng(6)
    before, after = rng.normal(size=(1632, 4)), rng.normal(0.05, size=(1632, 4))
    start = time.process_time()
    first = paired_comparison(before, after)
    assert time.process_time() - start < 3
    assert paired_comparison(before, after) == first
    assert paired_comparison(before, after, seed=1).interval != first.interval
    assert first.interval[1] - first.interval[0] < 0.05


def test_mean_over_training_seeds() -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(0.5, 0.2, size=(3, 50, 4))
    matrix = seed_matrix(values)
    assert matrix.mean == pytest.approx(values.mean())
    assert matrix.per_seed == pytest.approx([values[i].mean() for i in range(3)])
    assert matrix.interval[0] < matrix.mean < matrix.interval[1]
    assert (matrix.n_seeds, matrix.n_prompts) == (3, 50)
    for index in range(3):
        _, interval = bootstrap_mean(values[index])
        assert matrix.per_seed_interval[index] == pytest.approx(interval, abs=0.01)
    # Training seeds share the prompts: the same result thrice is no more certain than once.
    thrice = seed_matrix(np.repeat(values[:1], 3, axis=0))
    assert thrice.interval == pytest.approx(seed_matrix(values[:1]).interval)


def test_training_seeds_lose_a_prompt_together() -> None:
    values = np.array([[0.0, 1.0, 0.4], [0.2, 1.0, np.nan]])
    matrix = seed_matrix(values)
    assert matrix.n_prompts == 2
    assert matrix.per_seed == pytest.approx((0.5, 0.6))
    assert matrix.mean == pytest.approx(0.55)


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        paired_comparison(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        paired_comparison(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="num_resamples = 0"):
        paired_comparison([0.0], [1.0], num_resamples=0)
    with pytest.raises(ValueError, match="training seeds"):
        seed_matrix(np.zeros(4))
    with pytest.raises(ValueError, match="every training seed"):
        seed_matrix(np.full((2, 2), np.nan))
