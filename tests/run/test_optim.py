"""Optimizers under accelerate's fp16 gradient scaler."""

from __future__ import annotations

import torch
from accelerate.optimizer import AcceleratedOptimizer

from mmalign.config import TrainConfig
from mmalign.run.environment import make_accelerator
from mmalign.run.optim import make_optimizer


def test_the_step_that_an_overflow_skips_is_seen_by_the_loop():
    """What a GPU gets, on a scaler of the CPU."""
    make_accelerator("fp32")
    parameter = torch.nn.Parameter(torch.ones(4))
    config = TrainConfig(steps=2, batch_size=1, learning_rate=0.1)
    scaler = torch.amp.GradScaler("cpu")
    made = make_optimizer(config, [parameter], torch.device("cuda"), scaled=True)
    optimizer = AcceleratedOptimizer(made, scaler=scaler)
    scale = scaler.get_scale()
    for factor, skipped in ((float("inf"), True), (1.0, False)):
        scaler.scale((parameter * factor).sum()).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == skipped
        assert bool((parameter == 1).all()) == skipped
        assert scaler.get_scale() == scale / 2
        optimizer.zero_grad()
