"""From the `model` section to a policy."""

from __future__ import annotations

from typing import Any

import torch

from mmalign import registry
from mmalign.config import DataConfig, ModelConfig


def load_policy(
    model: ModelConfig,
    *,
    data: DataConfig | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    train: bool = True,
) -> Any:
    """The policy of `model.family`, its weights loaded from hub, folder or bundle.

    Args:
        model: the `model` section; `ModelConfig(family="sdxl", path="builtin:sdxl-tiny")` is the smallest.
        data: the `data` section (training resolution and size ids).
        device: default: CUDA, else MPS, else CPU.
        seed: seeds the LoRA initialisation.
        train: False to sample only: nothing trainable, less memory.

    Raises `ValueError` naming what cannot be loaded and what to do.
    """
    family = registry.resolve("family", model.family)
    return family(model, data=data, device=torch.device(device or default_device()), seed=seed, train=train)


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
