"""The discrete variance-preserving forward process of SD and SDXL and its prediction targets.

Shape legend: N samples, T training timesteps, … latent dims.
x_t = α_t x₀ + σ_t ε with α² + σ² = 1. ε-prediction: target ε. v-prediction: target v = α ε − σ x₀.
Hence ‖ε − ε̂‖² = α²‖v − v̂‖²: a v-score is an ε-score divided by α² (that is part of β's unit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


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

    def timestep(self, u: float) -> int:
        """The timestep at quantile u in [0, 1) of the uniform training density."""
        return min(int(u * self.num_timesteps), self.num_timesteps - 1)

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


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all non-batch dims in fp32, `[N]`. Works for images and 5-D video alike."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def check_finite(name: str, value: Tensor) -> None:
    """Raises `FloatingPointError` naming what is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{name} is not finite: {value.flatten()[:4].tolist()} …")
