"""Sampling that is recorded, and its replay under gradient: what step methods (policy gradient) ask of a denoiser.

Rollout and replay share one prediction, one `transition` and one `log_prob`, at one batch shape, so that a replay under
unchanged weights gives the recorded log-probs. Latents and log-probs stay fp32 whatever the network computes in: a
latent rounded to bf16 moves a mean log-prob by more than the usual clip range.

Shape legend: B samples of one micro-batch, S recorded steps, C/h/w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign import randomness
from mmalign.diffusion import kernels
from mmalign.diffusion.kernels import Steps
from mmalign.types import DrawKey


@dataclass(frozen=True)
class Trajectory:
    """What B samples leave behind for the update.

    Args:
        steps: the run's transitions, on the device.
        index_BS: which of them are recorded, per sample.
        x, next: latents before and after each recorded step, fp32, `[B, S, C, h, w]`.
        log_prob_BS: as seen while sampling, fp32.
        latents: the finished samples, `[B, C, h, w]`.
        contexts: encoded prompts (shared records, not copies).
        guidance_scale: of the run; above 1 both branches are sampled and trained.
    """

    steps: Steps
    index_BS: Tensor
    x: Tensor
    next: Tensor
    log_prob_BS: Tensor
    latents: Tensor
    contexts: Sequence[Any]
    guidance_scale: float


@dataclass(frozen=True)
class Replay:
    """One recorded step under the current weights: log-prob `[B]`, mean `[B, C, h, w]` and std `[B]`."""

    log_prob_B: Tensor
    mean: Tensor
    std_B: Tensor


@torch.no_grad()
def rollout(
    policy: Any,
    contexts: Sequence[Any],
    *,
    keys: Sequence[DrawKey],
    first_keys: Sequence[DrawKey],
    steps: Steps,
    index_BS: Tensor,
    guidance_scale: float,
) -> Trajectory:
    """Sample B images along `steps`, recording the steps `index_BS` of each.

    Args:
        keys: name each sample's step noise. first_keys: name its initial noise (equal keys share it).
        index_BS: recorded steps, all of them stochastic.
    """
    stochastic = steps.is_stochastic_S.tolist()  # asked on the host, before the tables move to the device
    steps = steps.to(policy.device)
    shape = policy.latent_shape
    x = policy.noise(shape, "rollout start", first_keys)
    predict = guided(policy, contexts, guidance_scale)
    wanted = set(index_BS.flatten().tolist())
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    log_prob: dict[int, Tensor] = {}
    for step in range(len(steps)):
        here = torch.full((len(contexts),), step, device=policy.device)
        A_B, B_B, std_B = steps.at(here)
        mean = kernels.transition(x, predict(x, steps.time_S[here]), A_B, B_B)
        following = mean
        if stochastic[step]:
            following = kernels.sample(mean, std_B, policy.noise(shape, f"rollout {step}", keys))
        if step in wanted:
            before[step], after[step] = x, following
            log_prob[step] = kernels.log_prob(following, mean, std_B)
        x = following
    return Trajectory(
        steps=steps,
        index_BS=index_BS.to(policy.device),
        x=_pick(before, index_BS),
        next=_pick(after, index_BS),
        log_prob_BS=_pick(log_prob, index_BS),
        latents=x,
        contexts=contexts,
        guidance_scale=guidance_scale,
    )


def replayer(policy: Any, trajectory: Trajectory) -> Callable[[int], Replay]:
    """A function from a recorded column to its `Replay` under the policy's current view and weights."""
    predict = guided(policy, trajectory.contexts, trajectory.guidance_scale)

    def replay(column: int) -> Replay:
        index_B = trajectory.index_BS[:, column]
        A_B, B_B, std_B = trajectory.steps.at(index_B)
        x = trajectory.x[:, column]
        mean = kernels.transition(x, predict(x, trajectory.steps.time_S[index_B]), A_B, B_B)
        return Replay(kernels.log_prob(trajectory.next[:, column], mean, std_B), mean, std_B)

    return replay


def guided(policy: Any, contexts: Sequence[Any], guidance_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The prediction with classifier-free guidance, fp32; the text is stacked and moved once."""
    size = len(contexts)
    if guidance_scale == 1:
        conditioning = policy.rollout_conditioning(contexts)
        return lambda x, time_N: policy.predict(x, time_N, conditioning).float()
    conditioning = policy.rollout_conditioning([*contexts, *([policy.unconditional()] * size)])

    def predict(x: Tensor, time_N: Tensor) -> Tensor:
        both = policy.predict(torch.cat([x, x]), torch.cat([time_N, time_N]), conditioning).float()
        positive, negative = both.chunk(2)
        return negative + guidance_scale * (positive - negative)

    return predict


def draw_noise(shape: tuple[int, ...], purpose: str, keys: Sequence[DrawKey]) -> Tensor:
    """Standard normal `[N, …]` on the CPU; equal keys share one draw."""
    drawn: dict[DrawKey, Tensor] = {}
    for key in keys:
        if key not in drawn:
            drawn[key] = randomness.normal(shape, key.seed, purpose, key.row_id, key.draw)
    return torch.stack([drawn[key] for key in keys])


def _pick(values: dict[int, Tensor], index_BS: Tensor) -> Tensor:
    """`[B, S, …]`: each sample's own steps out of whole-batch values; empty if nothing is recorded."""
    if not values:
        return torch.empty(index_BS.shape)
    rows = [torch.stack([values[step][b] for step in index_BS[b].tolist()]) for b in range(len(index_BS))]
    return torch.stack(rows)
