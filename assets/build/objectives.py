"""What a denoiser is trained to predict, and the stock scheduler that samples from it.

Shapes: B batch, C = 4 latent channels, H = W = 8. `time_B` is the number the denoiser receives as its timestep.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

NUM_TRAIN_TIMESTEPS = 1000


class Objective(Protocol):
    """One forward process with its regression target."""

    description: str
    sampler: str
    caution: str

    def scheduler(self) -> SchedulerMixin:
        """The stock scheduler whose config makes stock pipelines invert this process."""

    def draw(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Training times [B]."""

    def noised(
        self, latent_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, time_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The denoiser's input and its target."""


class VPrediction:
    """Variance-preserving diffusion with a zero-terminal-SNR schedule; the target is alpha eps - sigma x0."""

    description = "v-prediction, zero terminal SNR, trailing spacing"
    sampler = "DDIM"
    caution = "`clip_sample` must stay False."
    config: ClassVar[dict[str, object]] = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        # The default clips the predicted latent to [-1, 1]: all-right .41 becomes 0 on the same weights.
        "clip_sample": False,
        "steps_offset": 1,
    }

    def __init__(self) -> None:
        self.alpha_bar = self.scheduler().alphas_cumprod

    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler(**self.config)

    def draw(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(NUM_TRAIN_TIMESTEPS, (batch_size,), generator=generator)

    def noised(self, latent_BCHW, noise_BCHW, time_B):
        alpha_B111 = self.alpha_bar[time_B].sqrt().view(-1, 1, 1, 1)
        sigma_B111 = (1 - self.alpha_bar[time_B]).sqrt().view(-1, 1, 1, 1)
        noisy_BCHW = alpha_B111 * latent_BCHW + sigma_B111 * noise_BCHW
        return noisy_BCHW, alpha_B111 * noise_BCHW - sigma_B111 * latent_BCHW


class RectifiedFlow:
    """x_sigma = (1 - sigma) x0 + sigma eps; the target is eps - x0 and the time is 1000 sigma (SD3, arXiv 2403.03206).

    Args:
        shift: static time shift s sigma / (1 + (s - 1) sigma) of the training draws and of the scheduler.
        logit_normal: draw the unshifted sigma from a logit-normal(0, 1), as SD3 does; otherwise uniformly.
    """

    sampler = "FlowMatchEuler"
    caution = "The denoiser takes 1000 sigma as its timestep and predicts eps - x0."

    def __init__(self, shift: float, logit_normal: bool) -> None:
        self.shift = shift
        self.logit_normal = logit_normal
        density = "logit-normal(0, 1)" if logit_normal else "uniform"
        self.description = f"rectified flow, {density} sigma, shift {shift:g}"

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=self.shift)

    def draw(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        if self.logit_normal:
            sigma_B = torch.randn(batch_size, generator=generator).sigmoid()
        else:
            sigma_B = torch.rand(batch_size, generator=generator)
        return NUM_TRAIN_TIMESTEPS * self.shift * sigma_B / (1 + (self.shift - 1) * sigma_B)

    def noised(self, latent_BCHW, noise_BCHW, time_B):
        sigma_B111 = (time_B / NUM_TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
        return (1 - sigma_B111) * latent_BCHW + sigma_B111 * noise_BCHW, noise_BCHW - latent_BCHW
