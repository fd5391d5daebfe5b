"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmalign.config import TrainConfig


def make_optimizer(
    config: TrainConfig, parameters: Sequence[torch.nn.Parameter], device: torch.device, *, scaled: bool = False
) -> Any:
    """AdamW (fused on CUDA), 8-bit AdamW or Adafactor; `scaled`: its gradients come from an fp16 gradient scaler.

    Raises `ValueError` as `check_optimizer` does.
    """
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        # The fused step is called on an overflow too and skips by itself: accelerate would count it as done.
        return torch.optim.AdamW(parameters, fused=(device.type == "cuda" and not scaled) or None, **adam)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            scale_parameter=False,
            relative_step=False,
            clip_threshold=1.0,
        )
    return _adamw_8bit()(parameters, **adam)


def check_optimizer(config: TrainConfig) -> None:
    """Raises `ValueError` when the optimizer's package is not installed."""
    if config.optimizer == "adamw_8bit":
        _adamw_8bit()


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "train.optimizer = 'adamw_8bit' needs bitsandbytes: pip install 'mmalign[quant]', or use adamw or adafactor"
        ) from error
    return AdamW8bit


def make_scheduler(config: TrainConfig, optimizer: Any) -> Any:
    """Warm-up, then constant, cosine or linear to 0 at `steps`."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=max(config.steps, 1))
