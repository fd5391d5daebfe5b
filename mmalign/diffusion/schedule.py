"""Forward processes, their prediction targets and training densities: the discrete one of SD and SDXL, rectified flow.

Shape legend: N samples, T training timesteps, … latent dims.
Diffusion: x_t = α_t x₀ + σ_t ε with α² + σ² = 1. ε-prediction: target ε. v-prediction: target v = α ε − σ x₀.
Hence ‖ε − ε̂‖² = α²‖v − v̂‖²: a v-score is an ε-score divided by α² (that is part of β's unit).
Flow: x_σ = (1 − σ) x₀ + σ ε, σ in [0, 1], σ = 1 is noise; target v = ε − x₀.

Both have the same four members: `time(u)` maps a quantile of the training density to a time, `network_time` to what the
network is called with, `noised` and `target` are the process. Times are `[N]`: timestep indices, or σ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, cast

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Density = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class Schedule:
    """α and σ of every training timestep (fp32, computed in float64 from the scheduler's ᾱ)."""

    alpha_T: Tensor
    sigma_T: Tensor
    prediction_type: PredictionType

    @classmethod
    def from_scheduler(cls, scheduler: Any, device: torch.device | None = None) -> Schedule:
        """Read ᾱ, zero-terminal-SNR rescaling included, and the prediction type from a diffusers scheduler.

        Raises `ValueError` for a scheduler without a discrete ᾱ table or with an unknown prediction type.
        """
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod: not a discrete diffusion schedule. "
                f"Use a DDPM, DDIM, Euler or DPM-Solver scheduler config"
            )
        if scheduler.config.get("rescale_betas_zero_snr"):
            # Euler and DPM-Solver nudge the last ᾱ away from 0 for their own divisions; training must see exact zero SNR.
            alphas_cumprod = alphas_cumprod.clone()
            alphas_cumprod[-1] = 0.0
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {prediction_type!r}: must be epsilon, v_prediction or sample")
        bar_T = alphas_cumprod.double()
        alpha_T, sigma_T = bar_T.sqrt().float(), (1 - bar_T).clamp(min=0).sqrt().float()
        return cls(alpha_T.to(device), sigma_T.to(device), cast(PredictionType, prediction_type))

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_T)

    def time(self, u: float) -> int:
        """The timestep at quantile u in [0, 1) of the uniform training density."""
        return min(int(u * self.num_timesteps), self.num_timesteps - 1)

    def network_time(self, t_N: Tensor) -> Tensor:
        return t_N

    def noised(self, x0: Tensor, noise: Tensor, t_N: Tensor) -> Tensor:
        """x_t, `[N, …]`, fp32."""
        alpha, sigma = self._coefficients(t_N, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t_N: Tensor) -> Tensor:
        """What the network should predict, `[N, …]`, fp32."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self._coefficients(t_N, x0)
        return alpha * noise - sigma * x0

    def _coefficients(self, t_N: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        return self.alpha_T[t_N].view(shape), self.sigma_T[t_N].view(shape)


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow with a training density over σ.

    Args:
        density: of σ before the shift: uniform, or logit-normal(0, 1) as SD3 was trained.
        shift: s of σ ← s·σ / (1 + (s − 1)·σ); 1 leaves the density as it is. A dynamic shift μ is s = exp(μ),
            or s = μ where the scheduler's `time_shift_type` is `linear`.
    """

    density: Density = "logit_normal"
    shift: float = 1.0
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"timestep shift {self.shift}: must be positive (SD3.5 uses 3, 1 is no shift)")

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, *, num_tokens: int, density: Density | None = None, shift: float | None = None
    ) -> FlowSchedule:
        """The density that a flow-matching scheduler's config implies, at `num_tokens` image tokens.

        Raises `ValueError` for a scheduler that is not a flow-matching one.
        """
        config = scheduler.config
        if getattr(scheduler, "alphas_cumprod", None) is not None or config.get("shift") is None:
            raise ValueError(
                f"{type(scheduler).__name__} is no flow-matching scheduler. Use a FlowMatchEulerDiscreteScheduler config"
            )
        if shift is None:
            shift = config["shift"]
            if config.get("use_dynamic_shifting"):
                mu = dynamic_mu(config, num_tokens)
                shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        return cls(density or "logit_normal", float(shift), int(config["num_train_timesteps"]))

    def time(self, u: float) -> float:
        """σ at quantile u in [0, 1) of the training density."""
        if self.density == "logit_normal":
            # Two in a million quantiles at either end are cut off: the inverse normal is infinite there.
            u = 1 / (1 + math.exp(-NormalDist().inv_cdf(min(max(u, 1e-6), 1 - 1e-6))))
        return self.shift * u / (1 + (self.shift - 1) * u)

    def network_time(self, sigma_N: Tensor) -> Tensor:
        return sigma_N * self.num_timesteps

    def noised(self, x0: Tensor, noise: Tensor, sigma_N: Tensor) -> Tensor:
        """x_σ, `[N, …]`, fp32."""
        sigma = sigma_N.float().view((-1,) + (1,) * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, sigma_N: Tensor) -> Tensor:
        """The velocity ε − x₀ the network should predict, `[N, …]`, fp32."""
        return noise - x0


def dynamic_mu(config: Any, num_tokens: int) -> float:
    """μ of a resolution-dependent shift: linear in the number of image tokens, as the flow pipelines compute it."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (most - base) * (num_tokens - low) / (high - low)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all non-batch dims in fp32, `[N]`. Works for images and 5-D video alike."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def check_finite(name: str, value: Tensor) -> None:
    """Raises `FloatingPointError` naming what is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{name} is not finite: {value.flatten()[:4].tolist()} …")
