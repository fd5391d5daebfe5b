"""One step of a sampler as a Gaussian: ODE, Dance-SDE, Flow-SDE and DDIM-η through one `transition` and one `log_prob`.

Shape legend: B samples, S = N sampling steps (S1 = N + 1 noise levels), … latent dims.
Every kernel is affine in the latents x and the network's output: x' = A·x + B·out + std·z, z ~ N(0, 1). `flow_steps` and
`ddim_steps` compute A, B and std of a whole run in float64, once; rollout and update read the same fp32 numbers, so the
two cannot disagree about σ. Adding a kernel is adding its A, B and std here.

Conventions: flow time σ falls from 1 (noise) to 0 (data), x_σ = (1 − σ) x₀ + σ ε, out = v ≈ ε − x₀. Diffusion as in
`schedule.py`. A step without noise (std = 0) has no density: log-probs exist where `is_stochastic_S`. The last
transition reaches clean data, is always deterministic and is never trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmalign import randomness
from mmalign.diffusion.schedule import Schedule

FlowKernel = Literal["ode", "dance_sde", "flow_sde"]
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Steps:
    """The N transitions of one sampling run.

    Args:
        A_S, B_S, std_S: x' = A·x + B·out + std·z, fp32, `[N]`.
        time_S: what the network is called with, fp32, `[N]`: training timesteps, or σ · `time_scale`.
        is_stochastic_S: where noise is injected and a log-prob exists, bool, `[N]`; false for the last.
    """

    A_S: Tensor
    B_S: Tensor
    std_S: Tensor
    time_S: Tensor
    is_stochastic_S: Tensor

    def __len__(self) -> int:
        return len(self.A_S)

    def at(self, index_B: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and std of each sample's step: `[B]` each, or 0-d for one index."""
        return self.A_S[index_B], self.B_S[index_B], self.std_S[index_B]

    def to(self, device: torch.device | str) -> Steps:
        return Steps(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


# --- one step ---------------------------------------------------------------------------------------------------------


def transition(x: Tensor, out: Tensor, A_B: Tensor, B_B: Tensor) -> Tensor:
    """The mean A·x + B·out of the next latents, `[B, …]`, fp32.

    Args:
        x: latents, `[B, …]`. out: the network's output, guidance included, same shape.
        A_B, B_B: coefficients of each sample's own step, `[B]`, or 0-d for all.
    """
    x, out = _wide(x), _wide(out)
    return _per_sample(A_B, x) * x + _per_sample(B_B, x) * out


def sample(mean: Tensor, std_B: Tensor, noise: Tensor) -> Tensor:
    """The next latents mean + std·z, `[B, …]`, fp32. With std = 0 they are the mean, bit for bit."""
    return mean + _per_sample(std_B, mean) * noise


def log_prob(x_next: Tensor, mean: Tensor, std_B: Tensor) -> Tensor:
    """Log-density of the step that was taken, averaged over elements: mean[−(x' − μ)²/(2 std²)] − ln std − ½ ln 2π.

    Unit: nats per latent element. The joint log-density is this times the number of elements; the field's clip ranges
    (1e-4 and below) assume the average.

    Args:
        x_next: latents that were sampled, `[B, …]`, as recorded in fp32; no gradient flows into them.
        mean: `transition` under the policy that is asked, `[B, …]`.
        std_B: noise of each sample's own step, `[B]` or 0-d, positive. A deterministic step gives inf or NaN.

    Returns `[B]`, fp32.
    Source: DanceGRPO arXiv 2505.07818, Flow-GRPO arXiv 2505.05470, DDPO arXiv 2305.13301, as released.
    """
    mean = _wide(mean)
    z = (x_next.detach().to(mean.dtype) - mean) / _per_sample(std_B, mean)
    return -0.5 * z.square().flatten(1).mean(1) - std_B.log() - HALF_LOG_2PI


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std_B: Tensor) -> Tensor:
    """KL between the steps of two policies, averaged over elements: mean[(μ − μ_ref)²] / (2 std²), `[B]`, fp32.

    In terms of the outputs ½ (B/std)² · mean[(out − out_ref)²]. Exact, so late steps weigh little under shifted
    schedules (Flow-GRPO's image scripts leave out the step size: at 10 steps their β is ten times the one that fits here).
    """
    mean = _wide(mean)
    return ((mean - _wide(mean_ref)) / _per_sample(std_B, mean)).square().flatten(1).mean(1) / 2


# --- whole runs -------------------------------------------------------------------------------------------------------


def flow_steps(
    sigma_S1: Tensor,
    *,
    kernel: FlowKernel,
    level: float = 0.0,
    stochastic_S: Tensor | None = None,
    time_scale: float = 1000.0,
) -> Steps:
    """Euler–Maruyama steps of the reverse SDE dx = [v − ½ g² s] dσ + g dW with score s = −(x + (1 − σ) v) / σ.

    With D = σ − σ': A = 1 − g²D/(2σ), B = −D·(1 + g²(1 − σ)/(2σ)), std = g√D. Any g keeps the marginals in the limit of
    many steps; g = 0 is the Euler step of the ODE. `dance_sde`: g = level, a little noise everywhere. `flow_sde`:
    g = level·√(σ/(1 − σ)), most of it early; at σ = 1 the denominator is taken at the second σ, which makes the first
    step std = level and A = 1 − level²/2 whatever the schedule.

    Args:
        sigma_S1: N + 1 noise levels, strictly falling, first ≤ 1, last 0. Kept as given, never derived from a timestep.
        kernel: which g.
        level: published are η = 0.3 for `dance_sde` (0.25 video), a = 0.7 (SD3.5) to 0.9 (FLUX) for `flow_sde`.
        stochastic_S: where to inject noise, bool, `[N]`; the ODE elsewhere. Default: everywhere but the last.
        time_scale: the network's time is σ times this.

    Raises `ValueError` for σ that do not fall to 0, a level that is negative, not finite, or without use, and a window
    that reaches the last transition.
    Source: DanceGRPO arXiv 2505.07818 and Flow-GRPO arXiv 2505.05470 with their released codes, which differ only in g.
    """
    if kernel not in ("ode", "dance_sde", "flow_sde"):
        raise ValueError(f"kernel {kernel!r}: must be ode, dance_sde or flow_sde")
    if not (math.isfinite(level) and level >= 0):
        raise ValueError(f"{kernel} level = {level}: must be finite and not negative (published: 0.3 dance, 0.7 flow)")
    if kernel == "ode" and level != 0:
        raise ValueError(f"level = {level}: the ode kernel injects no noise. Use dance_sde or flow_sde, or level 0")
    sigma_S1 = sigma_S1.detach().cpu().double()
    if sigma_S1.ndim != 1 or len(sigma_S1) < 2:
        raise ValueError(f"sigmas of shape {list(sigma_S1.shape)}: a list of at least two is needed, from noise to 0")
    sigma_S, next_S = sigma_S1[:-1], sigma_S1[1:]
    if not (bool((sigma_S > next_S).all()) and 0 < sigma_S[0] <= 1 and next_S[-1] == 0):
        raise ValueError(f"sigmas {_short(sigma_S1)}: must fall strictly from at most 1 to exactly 0")
    stochastic_S = _stochastic(stochastic_S, len(sigma_S)) & (level > 0)

    if kernel == "flow_sde":
        one_minus_S = torch.where(sigma_S == 1, 1 - next_S, 1 - sigma_S)
        g2_S = level**2 * sigma_S / one_minus_S
    else:
        g2_S = torch.full_like(sigma_S, level**2)
    g2_S = torch.where(stochastic_S, g2_S, torch.zeros_like(g2_S))
    delta_S = sigma_S - next_S
    return Steps(
        A_S=(1 - g2_S * delta_S / (2 * sigma_S)).float(),
        B_S=(-delta_S * (1 + g2_S * (1 - sigma_S) / (2 * sigma_S))).float(),
        std_S=(g2_S * delta_S).sqrt().float(),
        time_S=(sigma_S * time_scale).float(),
        is_stochastic_S=stochastic_S,
    )


def ddim_steps(schedule: Schedule, timestep_S: Tensor, *, eta: float, stochastic_S: Tensor | None = None) -> Steps:
    """DDIM steps x' = α'·x̂₀ + √(σ'² − std²)·ε̂ + std·z with std = η·(σ'/σ)·√(1 − α²/α'²), for ε, v and x₀ networks.

    η = 0 is the deterministic sampler, η = 1 the ancestral posterior of DDPM. Each step goes to the next timestep of
    the list and the last to clean data (α' = 1), whatever `set_alpha_to_one` says, as that step is never trained.

    Args:
        schedule: α and σ of the training timesteps and what the network predicts.
        timestep_S: the N timesteps of the run, strictly falling, as `DDIMScheduler.set_timesteps` gives them.
        eta: in [0, 1]; the published online recipes use 1.
        stochastic_S: where to inject noise, bool, `[N]`; η = 0 elsewhere. Default: everywhere but the last.

    Raises `ValueError` for η outside [0, 1], timesteps that do not fall within the schedule, an ε-network at a timestep
    with α = 0 (zero terminal SNR: x holds no signal there that ε could be told from), and a window that reaches the
    last transition.
    Source: DDIM arXiv 2010.02502 eq. 12 and 16; as policy DDPO arXiv 2305.13301 and DanceGRPO arXiv 2505.07818.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: must be in [0, 1] (0 deterministic, 1 ancestral)")
    t_S = timestep_S.detach().cpu()
    if t_S.ndim != 1 or not len(t_S) or t_S.is_floating_point():
        raise ValueError(f"timesteps {_short(t_S)}: a list of at least one integer is needed")
    if not (bool((t_S[1:] < t_S[:-1]).all()) and t_S[-1] >= 0 and t_S[0] < schedule.num_timesteps):
        raise ValueError(f"timesteps {_short(t_S)}: must fall strictly within 0 to {schedule.num_timesteps - 1}")
    alpha_S, sigma_S = schedule.alpha_T.cpu().double()[t_S], schedule.sigma_T.cpu().double()[t_S]
    if schedule.prediction_type == "epsilon" and bool((alpha_S == 0).any()):
        raise ValueError(
            f"timestep {int(t_S[alpha_S == 0][0])} has zero SNR, where an epsilon network cannot give x0. Use a "
            "v_prediction model, or a scheduler config without rescale_betas_zero_snr"
        )
    stochastic_S = _stochastic(stochastic_S, len(t_S)) & (eta > 0)
    next_alpha_S, next_sigma_S = torch.ones_like(alpha_S), torch.zeros_like(sigma_S)
    next_alpha_S[:-1], next_sigma_S[:-1] = alpha_S[1:], sigma_S[1:]

    # 1 − α²/α'² from whichever of α and σ is small: the other is near 1 and its difference is mostly rounding.
    added_S = torch.where(sigma_S < alpha_S, sigma_S**2 - next_sigma_S**2, next_alpha_S**2 - alpha_S**2)
    variance_S = (eta * next_sigma_S / sigma_S) ** 2 * added_S / next_alpha_S**2
    variance_S = torch.where(stochastic_S, variance_S, torch.zeros_like(variance_S))
    direction_S = (next_sigma_S**2 - variance_S).clamp(min=0).sqrt()

    zero_S, one_S = torch.zeros_like(alpha_S), torch.ones_like(alpha_S)
    if schedule.prediction_type == "epsilon":
        clean_x_S, clean_out_S, noise_x_S, noise_out_S = 1 / alpha_S, -sigma_S / alpha_S, zero_S, one_S
    elif schedule.prediction_type == "v_prediction":
        clean_x_S, clean_out_S, noise_x_S, noise_out_S = alpha_S, -sigma_S, sigma_S, alpha_S
    else:
        clean_x_S, clean_out_S, noise_x_S, noise_out_S = zero_S, one_S, 1 / sigma_S, -alpha_S / sigma_S
    return Steps(
        A_S=(next_alpha_S * clean_x_S + direction_S * noise_x_S).float(),
        B_S=(next_alpha_S * clean_out_S + direction_S * noise_out_S).float(),
        std_S=variance_S.sqrt().float(),
        time_S=t_S.float(),
        is_stochastic_S=stochastic_S,
    )


# --- which steps ------------------------------------------------------------------------------------------------------


def window(seed: int, iteration: int, num_steps: int, *, size: int, low: int = 0, high: int | None = None) -> Tensor:
    """`size` consecutive steps out of low … high − 1, the same for every sample and rank of an iteration, bool, `[N]`.

    Per-sample windows are no option: members of a group with noise at different steps are not comparable.

    Args:
        iteration: the rollout's counter; the start is a function of (seed, iteration) alone.
        num_steps: N. size: number of stochastic steps.
        low, high: range of the steps, `high` exclusive; default all but the last transition, which is never in it.

    Raises `ValueError` if the range leaves the run or is smaller than `size`.
    """
    high = num_steps - 1 if high is None else high
    if not 0 <= low < high <= num_steps - 1:
        raise ValueError(
            f"window range {low} to {high} in {num_steps} steps: must satisfy 0 <= low < high <= {num_steps - 1} "
            "(the last transition is deterministic)"
        )
    if not 1 <= size <= high - low:
        raise ValueError(f"window size {size}: must be 1 to {high - low}, the steps from {low} to {high}")
    start = low + randomness.key(seed, "sde window", "", iteration) % (high - low - size + 1)
    steps_S = torch.arange(num_steps)
    return (steps_S >= start) & (steps_S < start + size)


def random_subset(seed: int, iteration: int, sample_ids: Sequence[str], num_steps: int, *, fraction: float) -> Tensor:
    """Which steps of each sample are trained: the first ⌊(N − 1)·fraction⌋ of its own permutation of all but the last.

    Args:
        sample_ids: identity of each of the B samples; its steps depend on (seed, iteration, id), never on its place.
        num_steps: N. fraction: share of the N − 1 trainable steps, in (0, 1]; DanceGRPO uses 0.6.

    Returns indices in training order, int64, `[B, S]`. Raises `ValueError` if no step remains.
    Source: DanceGRPO arXiv 2505.07818, released code.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: must be in (0, 1]; DanceGRPO trains 0.6 of the steps")
    count = int((num_steps - 1) * fraction + 1e-9)
    if count < 1:
        raise ValueError(
            f"fraction {fraction} of {num_steps - 1} trainable steps is none: raise it or sample more steps"
        )
    chosen = [
        torch.randperm(num_steps - 1, generator=randomness.generator(seed, "trained steps", name, iteration))[:count]
        for name in sample_ids
    ]
    return torch.stack(chosen) if chosen else torch.empty(0, count, dtype=torch.int64)


# --- shared -----------------------------------------------------------------------------------------------------------


def _stochastic(stochastic_S: Tensor | None, num_steps: int) -> Tensor:
    if stochastic_S is None:
        return torch.arange(num_steps) < num_steps - 1
    stochastic_S = stochastic_S.detach().cpu()
    if stochastic_S.dtype != torch.bool or list(stochastic_S.shape) != [num_steps]:
        raise ValueError(
            f"stochastic steps {stochastic_S.dtype} {list(stochastic_S.shape)}: must be one bool for each of "
            f"the {num_steps} steps"
        )
    if bool(stochastic_S[-1]):
        raise ValueError(
            f"step {num_steps - 1}: the last transition reaches clean data and takes no noise; leave it out"
        )
    return stochastic_S


def _wide(x: Tensor) -> Tensor:
    """fp32, or float64 where it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_sample(value_B: Tensor, like: Tensor) -> Tensor:
    return value_B.view(value_B.shape + (1,) * (like.ndim - value_B.ndim))


def _short(values: Tensor) -> str:
    head = [round(float(value), 5) for value in values.flatten()[:4]]
    return f"{head}{' …' if values.numel() > 4 else ''}"
