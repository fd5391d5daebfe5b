"""Group advantages: closed forms of the published variants, what is dropped, and independence of the order of samples.

Shape legend: N samples, K rewards.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from mmalign.advantages import Advantages, group_advantages

NAN = math.nan


def column(*rewards: float) -> Tensor:
    return torch.tensor(rewards, dtype=torch.float64)[:, None]


def groups(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def random_rewards(num: int = 48, num_rewards: int = 2, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, num_rewards, generator=generator), torch.arange(num) // size


# --- the published forms ----------------------------------------------------------------------------------------------


def test_dance_grpo_by_hand():
    """(r − mean) / (unbiased std + 1e-8) within the group: 1, 2, 3 has mean 2 and std 1."""
    ours = group_advantages(column(1, 2, 3, 10, 20), [1.0], groups(5, 5, 5, 9, 9), epsilon=1e-8)
    half = math.sqrt(0.5)
    torch.testing.assert_close(ours.value_N, torch.tensor([-1, 0, 1, -half, half]))
    assert ours.value_N.dtype == ours.weight_N.dtype == torch.float32
    assert ours.weight_N.tolist() == [1] * 5


def test_dance_grpo_equals_torch_on_random_groups():
    reward_NK, group_N = random_rewards(num_rewards=1)
    ours = group_advantages(reward_NK, [1.0], group_N, epsilon=1e-8)
    reward = reward_NK[:, 0].double().view(6, 8)
    expected = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(ours.value_N, expected.flatten().float())


def test_flow_grpo_divides_by_the_population_deviation_of_the_whole_rollout():
    reward_NK, group_N = random_rewards()
    ours = group_advantages(reward_NK, [0.7, 0.3], group_N, combine="rewards", std="global", epsilon=1e-4)
    reward = (reward_NK.double() @ torch.tensor([0.7, 0.3], dtype=torch.float64)).view(6, 8)
    expected = (reward - reward.mean(1, keepdim=True)) / (reward.std(correction=0) + 1e-4)
    torch.testing.assert_close(ours.value_N, expected.flatten().float())


def test_global_deviation_does_not_blow_up_a_group_of_nearly_equal_rewards():
    rewards, ids = column(0.5, 0.5001, 0.0, 1.0), groups(0, 0, 1, 1)
    in_group = group_advantages(rewards, [1.0], ids, epsilon=1e-8)
    overall = group_advantages(rewards, [1.0], ids, epsilon=1e-8, std="global")
    torch.testing.assert_close(in_group.value_N[:2].abs(), in_group.value_N[2:].abs(), rtol=2e-4, atol=0)
    assert overall.value_N[:2].abs().max() < 2e-4 * overall.value_N[2:].abs().max()


def test_without_a_deviation_the_advantage_keeps_the_unit_of_the_reward():
    ours = group_advantages(column(1, 2, 6), [2.0], groups(0, 0, 0), std="none", clip=None)
    assert ours.value_N.tolist() == [-4, -2, 6]


def test_combining_advantages_forgets_scales_and_combining_rewards_does_not():
    reward_NK, group_N = random_rewards()
    scaled_NK = reward_NK * torch.tensor([1.0, 1000.0])
    for combine, same in (("advantages", True), ("rewards", False)):
        plain = group_advantages(reward_NK, [1.0, 1.0], group_N, combine=combine, epsilon=0.0)
        scaled = group_advantages(scaled_NK, [1.0, 1.0], group_N, combine=combine, epsilon=0.0)
        assert torch.allclose(plain.value_N, scaled.value_N, atol=1e-4) is same


def test_combined_advantages_are_the_weighted_sum_of_those_of_each_reward():
    reward_NK, group_N = random_rewards()
    both = group_advantages(reward_NK, [0.8, -0.5], group_N, clip=None)
    parts = [group_advantages(reward_NK[:, k : k + 1], [1.0], group_N, clip=None).value_N for k in range(2)]
    torch.testing.assert_close(both.value_N, 0.8 * parts[0] - 0.5 * parts[1])


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others():
    rewards = [1.0, 2.0, 6.0, 7.0]
    ours = group_advantages(column(*rewards), [1.0], groups(0, 0, 0, 0), std="none", clip=None, leave_one_out=True)
    others = [statistics.fmean(rewards[:n] + rewards[n + 1 :]) for n in range(4)]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    torch.testing.assert_close(ours.value_N, torch.tensor(expected))


@pytest.mark.parametrize("combine", ["advantages", "rewards"])
@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_advantages_of_a_group_sum_to_zero(combine: str, std: str, leave_one_out: bool):
    reward_NK, group_N = random_rewards()
    reward_NK[3, 0] = reward_NK[17, 1] = NAN
    settings = {"combine": combine, "std": std, "leave_one_out": leave_one_out, "clip": None}
    ours = group_advantages(reward_NK, [1.0, 0.3], group_N, **settings)
    sums = torch.zeros(6).index_add(0, group_N, ours.value_N)
    assert sums.abs().max() < 2e-6


def test_shifting_the_rewards_of_a_group_changes_nothing_and_negating_them_the_sign():
    reward_NK, group_N = random_rewards()
    ours = group_advantages(reward_NK, [1.0, 0.3], group_N)
    moved_NK = reward_NK.double() + 3.0 * group_N[:, None]
    torch.testing.assert_close(group_advantages(moved_NK, [1.0, 0.3], group_N).value_N, ours.value_N)
    assert torch.equal(group_advantages(-reward_NK, [1.0, 0.3], group_N).value_N, -ours.value_N)


def test_clip_bounds_the_combined_advantage():
    rewards = column(*([0.0] * 99), 1.0)
    ids = torch.zeros(100, dtype=torch.int64)
    assert group_advantages(rewards, [1.0], ids, clip=None).value_N.max() > 9
    assert group_advantages(rewards, [1.0], ids).value_N.max() == 5
    assert group_advantages(-rewards, [1.0], ids, clip=2.0).value_N.min() == -2


# --- what is dropped --------------------------------------------------------------------------------------------------


def test_a_sample_without_a_reward_is_dropped_and_the_others_are_as_if_it_were_not_there():
    reward_NK, group_N = random_rewards()
    reward_NK[5, 1] = NAN
    ours = group_advantages(reward_NK, [1.0, 0.5], group_N)
    rest = torch.arange(48) != 5
    without = group_advantages(reward_NK[rest], [1.0, 0.5], group_N[rest])
    assert torch.equal(ours.value_N[rest], without.value_N)
    assert (ours.value_N[5], ours.weight_N[5]) == (0, 0)
    assert ours.weight_N.sum() == 47
    assert ours.stats.num_invalid == 1


@pytest.mark.parametrize("combine", ["advantages", "rewards"])
@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_equal_rewards_teach_nothing(combine: str, std: str):
    """Also where the mean rounds: 0.1 is not a third of 0.1 + 0.1 + 0.1."""
    rewards = column(0.1, 0.1, 0.1, 0.0, 1.0, 0.5)
    ours = group_advantages(rewards, [1.0], groups(0, 0, 0, 1, 1, 1), combine=combine, std=std, epsilon=0.0)
    assert ours.value_N[:3].tolist() == [0, 0, 0]
    assert ours.weight_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert ours.stats.zero_std_share == 0.5


def test_a_group_counts_if_one_of_its_rewards_varies():
    reward_NK = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    ours = group_advantages(reward_NK, [1.0, 1.0], groups(0, 0))
    assert ours.weight_N.tolist() == [1, 1]
    torch.testing.assert_close(ours.value_N, group_advantages(reward_NK[:, 1:], [1.0], groups(0, 0)).value_N)


def test_groups_of_fewer_than_two_valid_samples_are_dropped():
    ours = group_advantages(column(1.0, NAN, 2.0, 1.0, 3.0, NAN), [1.0], groups(0, 0, 1, 2, 2, 3))
    assert ours.weight_N.tolist() == [0, 0, 0, 1, 1, 0]
    assert ours.value_N[:3].tolist() == [0, 0, 0]
    assert (ours.stats.num_groups, ours.stats.short_share, ours.stats.zero_std_share) == (4, 0.75, 0.0)


def test_a_reward_that_failed_throughout_is_named():
    reward_NK = torch.tensor([[1.0, NAN], [2.0, NAN]])
    with pytest.raises(ValueError, match="reward 'clip' is NaN for all 2 samples"):
        group_advantages(reward_NK, [1.0, 0.5], groups(0, 0), names=["aesthetic", "clip"])
    with pytest.raises(ValueError, match="reward 1 is NaN for all 2 samples"):
        group_advantages(reward_NK, [1.0, 0.5], groups(0, 0))
    crossed = torch.tensor([[1.0, NAN], [NAN, 2.0]])
    with pytest.raises(ValueError, match="none of the 2 samples has all 2 rewards valid"):
        group_advantages(crossed, [1.0, 0.5], groups(0, 0))


def test_a_reward_of_weight_0_is_only_watched():
    reward_NK, group_N = random_rewards()
    watched_NK = reward_NK.clone()
    watched_NK[:, 1] = NAN
    watched_NK[0, 1] = 3.0
    ours = group_advantages(watched_NK, [1.0, 0.0], group_N)
    assert torch.equal(ours.value_N, group_advantages(reward_NK[:, :1], [1.0], group_N).value_N)
    assert ours.stats.num_invalid == 0
    assert ours.stats.reward_K[1] == 3.0


# --- best and worst of a group ----------------------------------------------------------------------------------------


def test_best_of_keeps_both_ends_with_the_advantages_of_all():
    reward_NK, group_N = random_rewards(num_rewards=1)
    everyone = group_advantages(reward_NK, [1.0], group_N)
    ours = group_advantages(reward_NK, [1.0], group_N, best_of=4)
    for group in range(6):
        inside = group_N == group
        ranked = reward_NK[inside, 0].argsort()
        expected = torch.zeros(8).index_fill(0, torch.cat([ranked[:2], ranked[-2:]]), 1.0)
        assert torch.equal(ours.weight_N[inside], expected)
    assert torch.equal(ours.value_N, everyone.value_N * ours.weight_N)
    assert ours.stats.num_used == 24


def test_best_of_a_group_that_is_no_larger_keeps_all():
    rewards, ids = column(1, 2, NAN, 3, 4), groups(0, 0, 0, 0, 0)
    assert group_advantages(rewards, [1.0], ids, best_of=4).weight_N.tolist() == [1, 1, 0, 1, 1]
    assert group_advantages(rewards, [1.0], ids, best_of=2).weight_N.tolist() == [1, 0, 0, 0, 1]


def test_best_of_ranks_beyond_the_clip_and_breaks_ties_by_order():
    ours = group_advantages(column(0, 1, 1, 9, 10), [1.0], groups(*[0] * 5), std="none", clip=1.0, best_of=2)
    assert ours.weight_N.tolist() == [1, 0, 0, 0, 1]
    ours = group_advantages(column(1, 0, 0, 1), [1.0], groups(*[0] * 4), best_of=2)
    assert ours.weight_N.tolist() == [0, 1, 0, 1]


# --- order, ranks, statistics -----------------------------------------------------------------------------------------


def same(first: Advantages, second: Advantages, order: Tensor) -> bool:
    return (
        torch.equal(first.value_N[order], second.value_N)
        and torch.equal(first.weight_N[order], second.weight_N)
        and first.stats == second.stats
    )


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("combine", ["advantages", "rewards"])
def test_the_order_in_which_ranks_bring_their_samples_does_not_change_a_bit(combine: str, std: str):
    """Groups straddle the two ranks, one of which has a NaN; gathering interleaves them. Sums are exact."""
    reward_NK, group_N = random_rewards(num=60, size=12)
    reward_NK[7, 0] = NAN
    ours = group_advantages(reward_NK, [1.0, 0.3], group_N, combine=combine, std=std)
    for seed in range(5):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        shuffled = group_advantages(reward_NK[order], [1.0, 0.3], group_N[order], combine=combine, std=std)
        assert same(ours, shuffled, order)


def test_sums_are_exact_where_rounding_would_depend_on_the_order():
    """(1e16 + 1) − 1e16 is 0 in float64 and 1e16 − 1e16 + 1 is 1."""
    for order in ([0, 1, 2], [0, 2, 1], [1, 2, 0]):
        rewards = column(1e16, 1.0, -1e16)[order]
        ours = group_advantages(rewards, [1.0], groups(0, 0, 0), std="none", clip=None)
        assert ours.value_N[order.index(1)].item() == pytest.approx(2 / 3, rel=1e-6)


def test_group_ids_beyond_the_precision_of_a_float_stay_apart():
    ids = groups(2**53, 2**53, 2**53 + 1, 2**53 + 1)
    ours = group_advantages(column(0, 1, 10, 11), [1.0], ids)
    assert ours.stats.num_groups == 2
    torch.testing.assert_close(ours.value_N[:2], ours.value_N[2:])
    with pytest.raises(ValueError, match="must be int64"):
        group_advantages(column(0, 1, 10, 11), [1.0], ids.float())


def test_statistics_by_hand():
    reward_NK = torch.tensor([[1.0, 10.0], [3.0, 20.0], [5.0, NAN], [2.0, 40.0], [2.0, 40.0]], dtype=torch.float64)
    stats = group_advantages(reward_NK, [1.0, 0.1], groups(0, 0, 0, 1, 1)).stats
    assert (stats.num_samples, stats.num_invalid, stats.num_used, stats.num_groups) == (5, 1, 2, 2)
    assert (stats.zero_std_share, stats.short_share) == (0.5, 0.0)
    # Weighted rewards of the valid: 2, 5, 6, 6.
    assert stats.reward == pytest.approx(4.75)
    assert stats.reward_std == pytest.approx(statistics.pstdev([2, 5, 6, 6]))
    assert stats.group_std == pytest.approx((statistics.stdev([2, 5]) + 0) / 2)
    assert stats.reward_K == pytest.approx((2.6, 27.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combine": "gdpo"}, "combine = 'gdpo'"),
        ({"std": "batch"}, "std = 'batch'"),
        ({"epsilon": -1e-4}, "epsilon"),
        ({"epsilon": NAN}, "epsilon"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"clip": NAN}, "clip = nan"),
        ({"best_of": 3}, "best_of = 3: must be even"),
        ({"best_of": 0}, "best_of = 0"),
        ({"names": ["a", "b"]}, "one each is needed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        group_advantages(column(0, 1), [1.0], groups(0, 0), **settings)


@pytest.mark.parametrize("weights", [[0.0], [NAN], [math.inf], [1.0, 1.0], []])
def test_weights_are_refused(weights: list[float]):
    with pytest.raises(ValueError, match="weights"):
        group_advantages(column(0, 1), weights, groups(0, 0))


@pytest.mark.parametrize(("rewards", "ids"), [(torch.zeros(0, 1), 0), (torch.zeros(2, 0), 2), (torch.zeros(2), 2)])
def test_shapes_are_refused(rewards: Tensor, ids: int):
    with pytest.raises(ValueError, match=r"must be \[samples, rewards\]"):
        group_advantages(rewards, [1.0], torch.zeros(ids, dtype=torch.int64))


def test_infinite_rewards_are_named():
    with pytest.raises(ValueError, match="reward 'clip' is infinite"):
        group_advantages(column(0, math.inf), [1.0], groups(0, 0), names=["clip"])
