"""Paired statistics over prompts: win rate, means and their 95 % bootstrap intervals.

The prompt is the unit of resampling: images of one prompt resemble each other, so treating prompts × seeds as
independent samples would make every interval too narrow. Each prompt weighs the same, however many of its images have
a valid score.

Shape legend: P prompts, S seeds per prompt, T training seeds, n images per prompt, R resamples, K statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95
# Resamples are drawn in chunks of at most this many indices: 1632 prompts × 10 000 resamples would take 130 MB at once.
INDICES_PER_CHUNK = 2_000_000


@dataclass(frozen=True)
class Comparison:
    """`after` against `before` on the same prompts and the same initial noise.

    Args:
        mean_before, mean_after, mean_difference: over pairs in which both scores are valid, each prompt weighing the
            same, in the reward's own scale. NaN without a valid pair.
        median_difference: median over prompts of the prompt's mean difference. A tiny uniform shift wins nearly every
            pair; mean and median tell it from a large gain.
        win_rate: share of pairs in which `after` scores better, ties counted ½.
        interval: 95 % interval of the win rate, bootstrap over prompts.
        mean_difference_interval: 95 % interval of the mean difference, bootstrap over prompts; NaN for fewer than two
            prompts, which tell nothing about the spread between prompts.
        tie_share: share of pairs with equal scores.
        n_prompts: prompts with at least one valid pair.
        n_seeds: images per prompt.
        n_valid, n_invalid: pairs with both scores, and pairs lacking one (NaN).
    """

    mean_before: float
    mean_after: float
    mean_difference: float
    mean_difference_interval: Interval
    median_difference: float
    win_rate: float
    interval: Interval
    tie_share: float
    n_prompts: int
    n_seeds: int
    n_valid: int
    n_invalid: int

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval of the win rate excludes ½, else `undecided`."""
        low, high = self.interval
        return "better" if low > 0.5 else "worse" if high < 0.5 else "undecided"


@dataclass(frozen=True)
class SeedMatrix:
    """One value (a win rate, a score) measured after training with several seeds.

    Args:
        mean: over training seeds and prompts.
        interval: 95 % interval of `mean` for these training seeds, bootstrap over prompts.
        per_seed, per_seed_interval: the same for each training seed alone. Look at them: the interval of the mean
            covers the choice of prompts, not that of the training seed.
        n_prompts: prompts with a valid value for every training seed.
    """

    mean: float
    interval: Interval
    per_seed: tuple[float, ...]
    per_seed_interval: tuple[Interval, ...]
    n_seeds: int
    n_prompts: int


def wins(before: ArrayLike, after: ArrayLike, *, higher_is_better: bool = True) -> FloatArray:
    """1 where `after` scores better, ½ for a tie, 0 where it scores worse, NaN where either score is not finite."""
    before_array, after_array = _paired(before, after)
    gain = after_array - before_array
    return 0.5 + 0.5 * np.sign(gain if higher_is_better else -gain)


def paired_comparison(
    before_PS: ArrayLike,
    after_PS: ArrayLike,
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
    higher_is_better: bool = True,
) -> Comparison:
    """Means, win rate with ties at ½, and 95 % percentile bootstrap intervals over prompts.

    The result does not depend on the order of the prompts. Where all prompts agree completely (every pair won, or
    every pair lost) resampling sees no uncertainty at all; the exact binomial interval over prompts stands in.

    Args:
        before_PS, after_PS: scores, `[P, S]` or `[P]`; entry (p, s) of both comes from the same prompt and noise.
            NaN or infinite = invalid: the pair is left out and counted.
        num_resamples: bootstrap resamples.
        seed: seed of the resampling.
        higher_is_better: False counts a lower score as the win; means keep the reward's sign.

    Raises `ValueError` if the shapes differ, or P or S is 0.
    """
    before, after = (_as_matrix(array) for array in _paired(before_PS, after_PS))
    num_prompts, num_seeds = before.shape
    if num_prompts == 0 or num_seeds == 0:
        raise ValueError(f"scores of shape {before.shape} hold nothing to compare; give at least one prompt and seed")
    win = wins(before, after, higher_is_better=higher_is_better)
    tie = np.where(np.isnan(win), np.nan, win == 0.5)
    columns_PK = np.stack([_row_means(x) for x in (before, after, after - before, win, tie)], axis=1)
    columns_PK = columns_PK[~np.isnan(columns_PK[:, 0])]
    # Sorted, so that the same prompts in another order give the same interval to the last bit.
    columns_PK = columns_PK[np.lexsort(columns_PK.T)]
    n_valid = int((~np.isnan(win)).sum())
    n_prompts = len(columns_PK)
    if n_prompts == 0:
        nan, nowhere = float("nan"), (float("nan"), float("nan"))
        return Comparison(nan, nan, nan, nowhere, nan, nan, nowhere, nan, 0, num_seeds, 0, win.size)
    mean_before, mean_after, difference, win_rate, tie_share = (float(x) for x in columns_PK.mean(axis=0))
    low_K, high_K = _bootstrap_means(columns_PK[:, 2:4], num_resamples, seed)
    return Comparison(
        mean_before=mean_before,
        mean_after=mean_after,
        mean_difference=difference,
        mean_difference_interval=(float(low_K[0]), float(high_K[0])) if n_prompts > 1 else (float("nan"), float("nan")),
        median_difference=float(np.median(columns_PK[:, 2])),
        win_rate=win_rate,
        interval=_proportion_interval(columns_PK[:, 3], (float(low_K[1]), float(high_K[1]))),
        tie_share=tie_share,
        n_prompts=n_prompts,
        n_seeds=num_seeds,
        n_valid=n_valid,
        n_invalid=win.size - n_valid,
    )


def bootstrap_mean(values_Pn: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> tuple[float, Interval]:
    """Mean of `[P]` or `[P, n]` values and its 95 % interval, bootstrap over prompts. NaN entries are left out."""
    means_P = _row_means(_as_matrix(np.asarray(values_Pn, dtype=np.float64)))
    means_P = np.sort(means_P[~np.isnan(means_P)])
    if len(means_P) == 0:
        raise ValueError("no valid value: every entry is NaN")
    low_K, high_K = _bootstrap_means(means_P[:, None], num_resamples, seed)
    return float(means_P.mean()), (float(low_K[0]), float(high_K[0]))


def seed_matrix(values_TPn: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> SeedMatrix:
    """Interval of the mean over training seeds, bootstrap over prompts, with each training seed beside it.

    All training seeds share the prompts, so one resample of prompts serves all of them.

    Args:
        values_TPn: `[T, P]` or `[T, P, n]`: training seed, prompt, image. For a win rate, pass `wins(before, after)`.
            A prompt without a valid value for some training seed is left out for all.

    Raises `ValueError` for another number of axes, or if no prompt is valid.
    """
    values = np.asarray(values_TPn, dtype=np.float64)
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"expected values of shape [training seeds, prompts, images], got {values.shape}")
    means_PT = np.stack([_row_means(matrix) for matrix in values], axis=1)
    means_PT = means_PT[~np.isnan(means_PT).any(axis=1)]
    if len(means_PT) == 0:
        raise ValueError("no prompt has a valid value for every training seed")
    means_PT = means_PT[np.lexsort(means_PT.T)]
    columns_PK = np.concatenate([means_PT.mean(axis=1, keepdims=True), means_PT], axis=1)
    low_K, high_K = _bootstrap_means(columns_PK, num_resamples, seed)
    intervals = [(float(low), float(high)) for low, high in zip(low_K, high_K, strict=True)]
    return SeedMatrix(
        mean=float(means_PT.mean()),
        interval=intervals[0],
        per_seed=tuple(float(x) for x in means_PT.mean(axis=0)),
        per_seed_interval=tuple(intervals[1:]),
        n_seeds=means_PT.shape[1],
        n_prompts=len(means_PT),
    )


def _paired(before: ArrayLike, after: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as float64, with NaN wherever either is not finite."""
    before_array, after_array = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before_array.shape != after_array.shape:
        raise ValueError(
            f"before has shape {before_array.shape}, after {after_array.shape}; "
            "a paired comparison needs the same prompts and seeds on both sides"
        )
    valid = np.isfinite(before_array) & np.isfinite(after_array)
    return np.where(valid, before_array, np.nan), np.where(valid, after_array, np.nan)


def _as_matrix(values: FloatArray) -> FloatArray:
    if values.ndim == 1:
        return values[:, None]
    if values.ndim != 2:
        raise ValueError(f"expected scores of shape [prompts, seeds] or [prompts], got {values.shape}")
    return values


def _row_means(values_PS: FloatArray) -> FloatArray:
    """Mean of each row's finite entries, NaN for a row without one."""
    valid = np.isfinite(values_PS)
    count = valid.sum(axis=1)
    total = np.where(valid, values_PS, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _bootstrap_means(values_PK: FloatArray, num_resamples: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of the column means; one resample of rows serves all K columns."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples = {num_resamples}: at least 1, 10000 for a 95 % interval")
    num_rows, num_columns = values_PK.shape
    rng = np.random.default_rng(seed)
    means_RK = np.empty((num_resamples, num_columns))
    step = max(1, INDICES_PER_CHUNK // num_rows)
    for start in range(0, num_resamples, step):
        stop = min(start + step, num_resamples)
        index = rng.integers(0, num_rows, size=(stop - start, num_rows), dtype=np.int32)
        for column in range(num_columns):
            means_RK[start:stop, column] = values_PK[:, column][index].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low_K, high_K = np.quantile(means_RK, [tail, 1 - tail], axis=0)
    return low_K, high_K


def _proportion_interval(wins_P: FloatArray, bootstrap: Interval) -> Interval:
    """The bootstrap interval, or the exact binomial one (Clopper-Pearson over prompts) where all prompts agree."""
    num_prompts = len(wins_P)
    bound = ((1 - CONFIDENCE) / 2) ** (1 / num_prompts)
    if (wins_P == 1).all():
        return bound, 1.0
    if (wins_P == 0).all():
        return 0.0, 1 - bound
    if num_prompts == 1:
        return 0.0, 1.0
    return bootstrap
