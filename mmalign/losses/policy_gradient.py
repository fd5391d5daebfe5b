"""Clipped policy gradient on log-probs of single steps: denoising steps of diffusion and flow, or tokens.

Shape legend: B samples, S steps. A step's log-prob is the mean over latent elements (diffusion, flow) or the token's
own (language models), in nats. Nothing is reduced; `reduce.masked_mean` does it with a global denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.losses.preference import declares


@declares(golden=None, accepts=("exact",))
def clipped_surrogate(
    log_prob_BS: Tensor,
    old_log_prob_BS: Tensor,
    advantage_B: Tensor,
    *,
    clip_range: float | tuple[float, float] = 1e-4,
) -> Tensor:
    """PPO's clipped surrogate of every step: max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)), ρ = exp(log π − log π_old).

    Each step is its own term; there is no importance correction across steps. At ρ = 1, which holds on the first
    update after a rollout, the loss is −A and its gradient −A·∇log π, whatever the clip range.

    Args:
        log_prob_BS: under the policy that is trained, `[B, S]`, nats per element or per token.
        old_log_prob_BS: as recorded when the sample was drawn, same shape; no gradient flows into it.
        advantage_B: `[B]`; finite also where the sample is masked out later.
        clip_range: ε, or (low, high), both > 0. In the log-probs' unit: averages over latent elements move by 1e-5 to
            1e-2, so diffusion and flow use 1e-4 (1e-5 for short windows), tokens 0.2.

    Returns `[B, S]`, fp32. Raises `ValueError` on shapes that differ or a clip range that is negative, not finite, or
    with low ≥ 1.
    Source: PPO arXiv 1707.06347 eq. 7; DanceGRPO arXiv 2505.07818; Flow-GRPO arXiv 2505.05470.
    """
    low, high = _bounds(clip_range)
    excess_BS = _log_ratio(log_prob_BS, old_log_prob_BS).expm1()
    advantage_BS = _columns(advantage_B, excess_BS)
    # In ρ − 1, which expm1 gives to full precision: ρ itself has steps of 1e-7, clip ranges go down to 1e-6.
    return -advantage_BS + torch.maximum(-advantage_BS * excess_BS, -advantage_BS * excess_BS.clamp(-low, high))


@dataclass(frozen=True)
class RatioStats:
    """How far the policy is from the one that sampled, per step, detached, fp32, `[B, S]`. Average with `masked_mean`.

    Args:
        ratio_BS: ρ. Its mean lies a little below 1 off-policy: the mean log-ratio of equally wide Gaussians is −KL.
        clipped_low_BS, clipped_high_BS: 1 where ρ < 1 − low, ρ > 1 + high. All on the low side at the first update is
            the sign of a replay that differs from the rollout (dtype, σ, guidance).
        approx_kl_BS: ½ (log ρ)².
    """

    ratio_BS: Tensor
    clipped_low_BS: Tensor
    clipped_high_BS: Tensor
    approx_kl_BS: Tensor


@torch.no_grad()
def ratio_stats(
    log_prob_BS: Tensor, old_log_prob_BS: Tensor, *, clip_range: float | tuple[float, float] = 1e-4
) -> RatioStats:
    """What a run logs of ρ; same arguments and errors as `clipped_surrogate`."""
    low, high = _bounds(clip_range)
    log_ratio_BS = _log_ratio(log_prob_BS, old_log_prob_BS)
    excess_BS = log_ratio_BS.expm1()
    return RatioStats(
        ratio_BS=log_ratio_BS.exp(),
        clipped_low_BS=(excess_BS < -low).to(excess_BS.dtype),
        clipped_high_BS=(excess_BS > high).to(excess_BS.dtype),
        approx_kl_BS=log_ratio_BS.square() / 2,
    )


def _log_ratio(log_prob_BS: Tensor, old_log_prob_BS: Tensor) -> Tensor:
    """log ρ, fp32 or float64."""
    if log_prob_BS.shape != old_log_prob_BS.shape or log_prob_BS.ndim != 2:
        raise ValueError(
            f"log-probs of shape {list(log_prob_BS.shape)} and {list(old_log_prob_BS.shape)}: both must be [B, S]"
        )
    dtype = torch.promote_types(log_prob_BS.dtype, torch.float32)
    return log_prob_BS.to(dtype) - old_log_prob_BS.detach().to(dtype)


def _columns(advantage_B: Tensor, like_BS: Tensor) -> Tensor:
    if list(advantage_B.shape) != [like_BS.shape[0]]:
        raise ValueError(f"advantages of shape {list(advantage_B.shape)}: must be [{like_BS.shape[0]}], one per sample")
    return advantage_B.detach().to(like_BS.dtype)[:, None]


def _bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if not (0 < low < 1 and 0 < high < math.inf):
        raise ValueError(
            f"clip_range = {clip_range}: must be ε or (low, high) with 0 < low < 1 and 0 < high "
            "(published for diffusion and flow: 1e-4 to 1e-5, tokens 0.2)"
        )
    return low, high
