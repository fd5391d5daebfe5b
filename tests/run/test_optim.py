"""Optimizers, schedules and clipping as a run applies them, and the gradient scaler of fp16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mmalign
from mmalign.config import TrainConfig
from mmalign.run.environment import make_accelerator
from mmalign.run.optim import make_optimizer


def logged(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def test_adafactor_resumes_with_the_same_bits(tiny: Callable, tmp_path: Path):
    train = {"optimizer": "adafactor", "batch_size": 2, "learning_rate": 1e-3}
    for name, stops in (("whole", (4,)), ("stopped", (2, 4))):
        for steps in stops:
            mmalign.train(tiny(train={**train, "steps": steps}, output_dir=str(tmp_path / name)))
    whole, stopped, halfway = (
        tmp_path / step
        for step in ("whole/checkpoints/step_4", "stopped/checkpoints/step_4", "stopped/checkpoints/step_2")
    )
    first, second, early = (load_file(step / "weights.safetensors") for step in (whole, stopped, halfway))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], early[name]) for name in first)
    state = torch.load(stopped / "optimizer.pt", weights_only=True)["state"]
    assert {"exp_avg_sq_row", "exp_avg_sq_col"} <= set().union(*state.values()), "another optimizer"


def linear(share: float) -> float:
    return 1 - share


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize(
    ("schedule", "shape"), [("constant", lambda share: 1.0), ("linear", linear), ("cosine", cosine)]
)
def test_learning_rates_follow_the_schedule(tiny: Callable, schedule: str, shape: Callable, warmup: int):
    """Warm-up i/w from 0, then the schedule from 1 to 0 at `steps`; a line of the log holds what its next step applies."""
    steps, peak = 6, 1e-4
    expected = [peak * (i / warmup if i < warmup else shape((i - warmup) / (steps - warmup))) for i in range(steps + 1)]
    applied: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: applied.append(float(optimizer.param_groups[0]["lr"]))
    )
    try:
        config = tiny(
            model={"lora": {"rank": 2}},
            train={"steps": steps, "learning_rate": peak, "schedule": schedule, "warmup_steps": warmup},
        )
        folder = mmalign.train(config).folder
    finally:
        hook.remove()
    assert applied == pytest.approx(expected[:-1], rel=1e-6, abs=1e-12)
    assert logged(folder, "learning_rate") == pytest.approx(expected[1:], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("share", [0.25, 4.0, None])
def test_the_gradient_is_clipped_to_max_grad_norm(tiny: Callable, tmp_path: Path, share: float | None):
    """`share`: max_grad_norm as a share of the first gradient's norm. What is logged is the norm before clipping."""
    model = {"lora": {"rank": 2}}
    train = {"steps": 1, "max_grad_norm": None}
    (norm,) = logged(mmalign.train(tiny(model=model, train=train)).folder, "grad_norm")
    limit = None if share is None else share * norm
    applied: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        applied.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    hook = register_optimizer_step_pre_hook(measure)
    try:
        config = tiny(model=model, train={**train, "max_grad_norm": limit}, output_dir=str(tmp_path / "clipped"))
        folder = mmalign.train(config).folder
    finally:
        hook.remove()
    assert applied == pytest.approx([norm * min(1.0, share or 1.0)], rel=1e-4)
    assert logged(folder, "grad_norm") == pytest.approx([norm], rel=1e-6)
