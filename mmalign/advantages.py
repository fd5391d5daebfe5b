"""From rewards to advantages: how much better a sample is than its group, the samples of the same prompt.

Shape legend: N samples of one rollout over all ranks, K rewards.
The caller gathers all samples in canonical order and every rank computes the same numbers. Sums are exact (`math.fsum`),
so they depend neither on the order of the samples nor on how ranks shared them. Dropped samples keep their row and get
weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Combine = Literal["advantages", "rewards"]
Spread = Literal["group", "global", "none"]


@dataclass(frozen=True)
class AdvantageStats:
    """What a run logs of its rewards. Means and deviations are over valid samples; shares are of groups.

    Args:
        num_samples, num_invalid: all samples; those with a reward that is NaN.
        num_used: samples with weight 1.
        num_groups: prompts.
        zero_std_share: share of groups with equal rewards throughout, which teach nothing.
        short_share: share of groups with fewer than two valid samples.
        group_std: mean over groups of the (unbiased) deviation of the weighted reward.
        reward, reward_std: the weighted reward.
        reward_K: mean of each reward over its own valid samples; NaN for one with weight 0 that has none.
    """

    num_samples: int
    num_invalid: int
    num_used: int
    num_groups: int
    zero_std_share: float
    short_share: float
    group_std: float
    reward: float
    reward_std: float
    reward_K: tuple[float, ...]


@dataclass(frozen=True)
class Advantages:
    """Advantage of each sample, fp32, `[N]`, 0 where dropped; weight 1 or 0, fp32, `[N]`; statistics for the log."""

    value_N: Tensor
    weight_N: Tensor
    stats: AdvantageStats


def group_advantages(
    reward_NK: Tensor,
    weight_K: Sequence[float],
    group_N: Tensor,
    *,
    names: Sequence[str] | None = None,
    combine: Combine = "advantages",
    std: Spread = "group",
    epsilon: float = 1e-4,
    clip: float | None = 5.0,
    leave_one_out: bool = False,
    best_of: int | None = None,
) -> Advantages:
    """A = clip( (r − mean of its group) / (std + epsilon) ), over the valid samples of each group.

    A sample with any NaN among the rewards that count (weight ≠ 0) is dropped, nothing is imputed. Dropped as well:
    groups with fewer than two valid samples, groups whose rewards are all equal, and what `best_of` leaves out.

    Args:
        reward_NK: raw rewards, `[N, K]`, NaN where invalid.
        weight_K: weight of each reward; 0 watches it only, a negative one trains against it.
        group_N: group of each sample, int64 (a float would merge ids above 2²⁴).
        names: of the rewards, for errors.
        combine: `advantages` normalises each reward in its group, then adds them up weighted (DanceGRPO): scales do not
            matter. `rewards` adds up raw rewards first (Flow-GRPO): scales are part of the weights.
        std: `group` divides by the group's unbiased deviation (DanceGRPO), `global` by the population deviation of all
            valid samples of the rollout (Flow-GRPO), so that groups of nearly equal rewards are not blown up, `none` by
            nothing; each as its authors' code has it.
        epsilon: added to the deviation. DanceGRPO's code 1e-8, Flow-GRPO's 1e-4, in the reward's unit.
        clip: bound of |A|, applied last; None for no bound. DanceGRPO's code clips each reward's part instead.
        leave_one_out: the baseline is the mean of the *other* samples, so A grows by n/(n − 1).
        best_of: even b; only the b/2 highest and b/2 lowest of a group count, ranked by the advantage among all.

    Raises `ValueError` naming the reward that has no valid sample, for no valid sample at all, infinite rewards, shapes
    and settings out of range.
    Source: DanceGRPO arXiv 2505.07818, Flow-GRPO arXiv 2505.05470, RLOO arXiv 2402.14740 (leave one out).
    """
    num_samples, num_rewards = _check(reward_NK, weight_K, group_N, names)
    _check_settings(combine, std, epsilon, clip, best_of)
    rewards = reward_NK.detach().double().cpu()
    counted = [k for k in range(num_rewards) if weight_K[k] != 0]
    valid = (~rewards[:, counted].isnan()).all(1).tolist()
    _check_any_valid(rewards, counted, valid, names)

    columns: list[list[float]] = rewards.T.tolist()
    total = [math.fsum(weight_K[k] * columns[k][n] for k in counted) for n in range(num_samples)]
    # What is normalised by itself, and its weight in the sum.
    terms = [(1.0, total)] if combine == "rewards" else [(weight_K[k], columns[k]) for k in counted]
    everyone = [n for n in range(num_samples) if valid[n]]
    global_std = [_deviation([column[n] for n in everyone], unbiased=False) for _, column in terms]

    groups: dict[int, list[int]] = {}
    for n, group in enumerate(group_N.tolist()):
        groups.setdefault(group, [])
        if valid[n]:
            groups[group].append(n)

    value, weight = [0.0] * num_samples, [0.0] * num_samples
    num_flat = num_short = 0
    for members in groups.values():
        if len(members) < 2:
            num_short += 1
            continue
        parts = []
        for (term_weight, column), spread in zip(terms, global_std, strict=True):
            own = [column[n] for n in members]
            if min(own) == max(own):  # exactly: rounding would leave a deviation of 1e-17 to be divided by
                continue
            mean = math.fsum(own) / len(own)
            scale = term_weight * (len(own) / (len(own) - 1) if leave_one_out else 1.0)
            if std != "none":
                scale /= (_deviation(own, unbiased=True) if std == "group" else spread) + epsilon
            parts.append([scale * (reward - mean) for reward in own])
        if not parts:
            num_flat += 1
            continue
        advantage = [math.fsum(part[i] for part in parts) for i in range(len(members))]
        for i in _kept(advantage, best_of):
            value[members[i]] = advantage[i] if clip is None else max(-clip, min(clip, advantage[i]))
            weight[members[i]] = 1.0

    return Advantages(
        torch.tensor(value, dtype=torch.float64).float(),
        torch.tensor(weight),
        AdvantageStats(
            num_samples=num_samples,
            num_invalid=num_samples - len(everyone),
            num_used=int(sum(weight)),
            num_groups=len(groups),
            zero_std_share=num_flat / len(groups),
            short_share=num_short / len(groups),
            group_std=_mean([_deviation([total[n] for n in m], unbiased=True) for m in groups.values() if len(m) > 1]),
            reward=_mean([total[n] for n in everyone]),
            reward_std=_deviation([total[n] for n in everyone], unbiased=False),
            reward_K=tuple(_mean([reward for reward in column if not math.isnan(reward)]) for column in columns),
        ),
    )


def _kept(advantage: list[float], best_of: int | None) -> list[int]:
    """Places of the best_of/2 highest and lowest; ties go by canonical order."""
    if best_of is None or len(advantage) <= best_of:
        return list(range(len(advantage)))
    order = sorted(range(len(advantage)), key=lambda i: advantage[i])
    return order[: best_of // 2] + order[-(best_of // 2) :]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _deviation(values: list[float], *, unbiased: bool) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - unbiased, 1))


def _check(
    reward_NK: Tensor, weight_K: Sequence[float], group_N: Tensor, names: Sequence[str] | None
) -> tuple[int, int]:
    if reward_NK.ndim != 2 or 0 in reward_NK.shape:
        raise ValueError(f"rewards of shape {list(reward_NK.shape)}: must be [samples, rewards], both at least 1")
    num_samples, num_rewards = reward_NK.shape
    if len(weight_K) != num_rewards or (names is not None and len(names) != num_rewards):
        raise ValueError(f"{len(weight_K)} weights and names {names} for {num_rewards} rewards: one each is needed")
    if not all(math.isfinite(weight) for weight in weight_K) or not any(weight_K):
        raise ValueError(f"reward weights {list(weight_K)}: must be finite, and one of them not 0")
    if list(group_N.shape) != [num_samples] or group_N.dtype != torch.int64:
        raise ValueError(
            f"group ids {group_N.dtype} {list(group_N.shape)}: must be int64, one for each of {num_samples} samples"
        )
    infinite = reward_NK.isinf().any(0).tolist()
    if any(infinite):
        raise ValueError(f"{_name(names, infinite.index(True))} is infinite: return NaN for what cannot be scored")
    return num_samples, num_rewards


def _check_settings(combine: str, std: str, epsilon: float, clip: float | None, best_of: int | None) -> None:
    if combine not in ("advantages", "rewards"):
        raise ValueError(f"combine = {combine!r}: must be advantages or rewards")
    if std not in ("group", "global", "none"):
        raise ValueError(f"std = {std!r}: must be group, global or none")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon = {epsilon}: must be finite and not negative (1e-4 or 1e-8)")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip = {clip}: must be positive, or none for no bound (5 is usual)")
    if best_of is not None and (best_of < 2 or best_of % 2):
        raise ValueError(
            f"best_of = {best_of}: must be even and at least 2, half from the top and half from the bottom"
        )


def _check_any_valid(rewards: Tensor, counted: list[int], valid: list[bool], names: Sequence[str] | None) -> None:
    for k in counted:
        if bool(rewards[:, k].isnan().all()):
            raise ValueError(
                f"{_name(names, k)} is NaN for all {len(valid)} samples of this rollout: nothing to learn from"
            )
    if not any(valid):
        raise ValueError(
            f"none of the {len(valid)} samples has all {len(counted)} rewards valid: nothing to learn from"
        )


def _name(names: Sequence[str] | None, k: int) -> str:
    return f"reward {names[k] if names is not None else k!r}"
