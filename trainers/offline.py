"""The loop over fixed data, visible from the first batch to the last checkpoint.

    fetch -> score (policy, reference) -> loss -> backward -> clip -> step -> ema -> log -> preview -> checkpoint

The method decides what to score and how scores become a loss; the policy knows how to score. Everything else is here.
Left out on purpose: callbacks, and any branch on a model family or a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmalign.config import LoadedConfig
from mmalign.run.folder import RunResult
from mmalign.run.reference import ReferenceCache, chunked, chunks, score_reference
from mmalign.run.session import Session
from mmalign.types import Batch, LossPart


def train(loaded: LoadedConfig) -> RunResult:
    """Train to `train.steps` (or the stop rule, or an interruption), continuing what the run folder holds."""
    with Session(loaded) as session:
        if session.already_finished is not None:
            return session.already_finished
        config, accelerator = session.config.train, session.accelerator
        method, policy = session.load_method(), session.load_policy()
        batches = session.load_data(policy, method)
        reference = session.cache_reference(policy, method, batches)
        state = session.restore(policy, batches)
        session.preflight(policy, method, batches, reference, state)
        optimizer, scheduler, ema = session.optimizer, session.scheduler, session.ema
        parameters = [parameter for _, parameter in policy.trainable()]

        with session.training(state) as meter:
            stream = batches.iterate(state.step, config.steps)
            while state.step < config.steps and not session.should_stop:
                for micro in range(config.accumulate):
                    batch = next(stream)
                    last_micro = micro == config.accumulate - 1
                    for loss, last_part in losses(policy, method, batch, reference, config.score_chunk, meter, config):
                        # The forward belongs inside: DDP decides there whether its backward will synchronise.
                        with sync_only(last_micro and last_part, accelerator, policy):
                            accelerator.backward(loss() / config.accumulate)
                norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
                optimizer.step()
                skipped = optimizer.step_was_skipped  # fp16 only: the gradient scaler met an overflow and halves itself
                if not skipped:
                    scheduler.step()
                    if ema is not None:
                        ema.step(parameters)
                optimizer.zero_grad(set_to_none=True)
                state.step += 1
                state.rows_seen += batches.rows_per_step
                session.after_step(policy, state, meter, norm, skipped=skipped)
        return session.finish(policy, state)


def losses(
    policy: Any, method: Any, batch: Batch, reference: ReferenceCache | None, chunk: int | None, meter: Any, config: Any
) -> Iterator[tuple[Callable[[], Tensor], bool]]:
    """What to back-propagate for one micro-batch: functions that run the forward, each with whether it is the last.

    Joint: one forward of all requests. Score-then-backward (`train.score_chunk`): score everything without a graph, take
    ∂loss/∂score, then back-propagate gradient · score chunk by chunk; the same gradients with one chunk's memory.
    """
    requests = method.requests(batch)
    reference_R = reference_scores(policy, method, batch, reference, chunk)
    if chunk is None or chunk >= len(requests):

        def joint() -> Tensor:
            part = method.loss(batch, policy.score(requests), reference_R)
            record(meter, part, config.accumulate)
            return part.loss_B.mean()

        yield joint, True
        return
    with torch.no_grad():
        score = chunked(policy, requests, chunk)
    value_R = score.value_R.requires_grad_(True)
    part = method.loss(batch, score, reference_R)
    record(meter, part, config.accumulate)
    (gradient_R,) = torch.autograd.grad(part.loss_B.mean(), value_R)
    parts = chunks(requests, chunk)
    for number, part_of in enumerate(parts):
        some, gradient = [requests[index] for index in part_of], gradient_R[part_of]

        def one(some: Any = some, gradient: Tensor = gradient) -> Tensor:
            return (policy.score(some).value_R * gradient).sum()

        yield one, number == len(parts) - 1


def reference_scores(
    policy: Any, method: Any, batch: Batch, reference: ReferenceCache | None, chunk: int | None
) -> Tensor | None:
    """`[R]` from the cache, from a forward under the reference view, or None for reference-free methods."""
    if not method.needs_reference:
        return None
    return reference.get(batch) if reference is not None else score_reference(policy, method, batch, chunk)


def record(meter: Any, part: LossPart, accumulate: int) -> None:
    values = {"loss": part.loss_B, **part.metrics}
    meter.add({name: value.detach().mean() / accumulate for name, value in values.items()})


def sync_only(now: bool, accelerator: Accelerator, policy: Any) -> Any:
    """Gradients cross processes once per optimizer step, with the last backward."""
    return nullcontext() if now else accelerator.no_sync(policy.network)
