"""Schedules of published samplers and seeded noise, shared by the tests of this folder."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor


def sd35_sigmas(num_steps: int = 10) -> Tensor:
    """What SD3.5 samples with: diffusers' own schedule, its static shift of 3 applied twice."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


def shifted(num_steps: int, shift: float = 3.0) -> Tensor:
    """DanceGRPO's schedule: a shifted line from 1 to 0, float64."""
    line = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * line / (1 + (shift - 1) * line)


def flux_sigmas() -> Tensor:
    """Six steps of FLUX at 512², 1024 tokens: dynamic shift 0.63."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist(), mu=0.63)
    return scheduler.sigmas


def ddim(prediction_type: str, **config) -> DDIMScheduler:
    defaults = {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(prediction_type=prediction_type, set_alpha_to_one=True, **{**defaults, **config})


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
