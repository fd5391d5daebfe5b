"""What a run checks on its first batch, before it spends anyone's GPU hours.

Step-0 golden loss, implicit accuracy ½, a gradient for every trained tensor, and the unit of β as a gradient factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.rollouts import Trajectory
from mmalign.run.reference import chunked, chunks
from mmalign.types import Batch, ScoreKind

# Rounding of one score relative to its size: same kernel and batch shape, or another shape (a cached reference).
SCORE_ROUNDING = {"fp32": 3e-6, "bf16": 2e-2, "fp16": 3e-3}
SAME_SHAPE_TOLERANCE = 1e-6
UNIT: dict[ScoreKind, str] = {"surrogate": "½ · mean squared error", "exact": "summed nats"}
# Of a mean log-prob: rollout and replay are the same computation at the same shape.
REPLAY_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-5, "fp16": 1e-5}


class PreflightError(RuntimeError):
    """A check failed: training would not do what the config says."""


@dataclass(frozen=True)
class Preflight:
    """Numbers seen on the probe batch. `score_gradient` is mean |∂loss/∂score|: −β/2 for DPO at step 0, so its unit."""

    loss: float
    golden: float | None
    tolerance: float
    implicit_accuracy: float | None
    score_gradient: float
    kind: ScoreKind
    num_tensors: int
    zero_gradients: tuple[str, ...]
    metrics: tuple[str, ...]

    def lines(self) -> list[str]:
        golden = f"{self.golden:.6f} ± {self.tolerance:.1e}" if self.golden is not None else "none declared"
        accuracy = "" if self.implicit_accuracy is None else f", implicit accuracy {self.implicit_accuracy:.2f}"
        return [
            f"step-0 loss {self.loss:.6f} (golden {golden}){accuracy}",
            f"gradient factor mean |∂loss/∂score| = {self.score_gradient:.4g} per unit of score ({UNIT[self.kind]})",
            reach_line(self.num_tensors, self.zero_gradients),
        ]


def probe(
    policy: Any,
    method: Any,
    batch: Batch,
    reference_R: Tensor | None,
    *,
    dtype: str,
    cached: bool,
    chunk: int | None = None,
) -> Preflight:
    """Score, loss and backward on one batch; gradients are cleared again and no randomness is consumed.

    Scores are taken without a graph, as the reference's are, and back-propagated `chunk` requests at a time: the check
    needs no more memory than a training step.

    Raises `PreflightError` naming the check, what was seen and what was expected.
    """
    requests = method.requests(batch)
    with torch.no_grad():
        score = chunked(policy, requests, chunk)
    if score.kind not in method.accepts:
        raise PreflightError(
            f"this policy gives {score.kind!r} scores, the configured losses are defined for {sorted(method.accepts)}"
        )
    value_R = score.value_R.requires_grad_(True)
    part = method.loss(batch, score, reference_R)
    loss = part.loss_B.mean()
    (gradient_R,) = torch.autograd.grad(loss, value_R)
    golden = method.golden_loss
    tolerance = golden_tolerance(golden, gradient_R, value_R, dtype=dtype, cached=cached)
    seen = float(loss.detach())
    if golden is not None and not abs(seen - golden) <= tolerance:
        raise PreflightError(
            f"step-0 loss is {seen:.8f}, expected {golden:.8f} ± {tolerance:.1e}: policy and reference differ "
            f"before training. A stale reference cache, a wrong adapter below model.adapters, or non-deterministic kernels"
        )
    accuracy = part.metrics.get("implicit_accuracy") if reference_R is not None else None
    for some in chunks(requests, chunk):
        (policy.score([requests[index] for index in some]).value_R * gradient_R[some]).sum().backward()
    num_tensors, zero = gradient_reach(policy)
    return Preflight(
        loss=seen,
        golden=golden,
        tolerance=tolerance,
        implicit_accuracy=None if accuracy is None else float(accuracy.mean()),
        score_gradient=float(gradient_R.abs().mean()) * len(batch),
        kind=score.kind,
        num_tensors=num_tensors,
        zero_gradients=zero,
        metrics=tuple(part.metrics),
    )


def reach_line(num_tensors: int, zero: Sequence[str]) -> str:
    others = [name for name in zero if ".lora_A." not in name]
    parts = [f"gradients reach {num_tensors - len(zero)} of {num_tensors} trained tensors"]
    if len(others) < len(zero):
        parts.append(f"{len(zero) - len(others)} LoRA A factors have zero gradient while B = 0")
    if others:
        parts.append(
            f"{len(others)} with zero gradient on this batch (unused by the model, or too small for the dtype), "
            f"e.g. {others[:3]}"
        )
    return "; ".join(parts)


def gradient_reach(policy: Any) -> tuple[int, tuple[str, ...]]:
    """(number of trained tensors, names of those with zero gradient) after a backward pass; the gradients are cleared.

    Raises `PreflightError` if a tensor got none, if all are zero, or if one is not finite.
    """
    names = [name for name, _ in policy.trainable()]
    gradients = [parameter.grad for _, parameter in policy.trainable()]
    absent = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
    if absent:
        raise PreflightError(f"no gradient reaches {len(absent)} of {len(names)} trained tensors, e.g. {absent[:3]}")
    norms = torch.stack([g.float().norm() for g in gradients if g is not None])
    for _, parameter in policy.trainable():
        parameter.grad = None
    if not bool(torch.isfinite(norms).all()):
        raise PreflightError("the gradient of the first batch is not finite; try model.dtype=bf16 or fp32")
    zero = tuple(name for name, norm in zip(names, norms.tolist(), strict=True) if norm == 0)
    if len(zero) == len(names):
        raise PreflightError("all gradients of the first batch are exactly zero: nothing would be trained")
    return len(names), zero


def probe_rollout(policy: Any, trajectory: Trajectory, *, dtype: str) -> list[str]:
    """Replay a rollout under unchanged weights: the log-probs must be the recorded ones, and gradients must flow.

    Returns lines for the user. Raises `PreflightError` naming the step where replay and rollout differ.
    """
    replay = policy.replayer(trajectory)
    worst, where = 0.0, 0
    # The first column with gradients, as the update replays it; the others without, to spare their graphs.
    with_gradient_B = replay(0).log_prob_B
    for column in range(trajectory.log_prob_BS.shape[1]):
        with torch.no_grad():
            seen_B = with_gradient_B if column == 0 else replay(column).log_prob_B
            difference = (seen_B - trajectory.log_prob_BS[:, column]).abs().max()
        if not float(difference) <= worst:  # NaN included
            worst, where = float(difference), column
    tolerance = REPLAY_TOLERANCE[dtype]
    if not worst <= tolerance:
        steps = trajectory.index_BS[:, where].tolist()
        raise PreflightError(
            f"replaying the rollout gives other log-probs than were recorded: {worst:.2e} per element at steps {steps}, "
            f"allowed {tolerance:.0e}. The ratio would start away from 1: dropout, another batch shape, or "
            f"non-deterministic kernels"
        )
    with_gradient_B.mean().backward()
    num_tensors, zero = gradient_reach(policy)
    return [
        f"replay of the rollout: log-probs differ by at most {worst:.1e} per element (allowed {tolerance:.0e}), ratio 1",
        reach_line(num_tensors, zero),
    ]


def golden_tolerance(golden: float | None, gradient_R: Tensor, value_R: Tensor, *, dtype: str, cached: bool) -> float:
    """How far the step-0 loss may be from its golden value.

    Same kernels at the same batch shape: 1e-6 relative. With a cached reference the scores were rounded at another batch
    shape: first order in the score gradient (∝ β) times the rounding of each score.
    """
    if golden is None:
        return 0.0
    tolerance = SAME_SHAPE_TOLERANCE * max(abs(golden), 1e-3)
    if cached:
        tolerance += float((gradient_R.abs() * value_R.detach().abs()).sum()) * SCORE_ROUNDING[dtype]
    return tolerance
