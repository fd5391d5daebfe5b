"""Atomic checkpoints and exact resume.

A checkpoint holds everything the next step depends on: trained weights, optimizer, schedule, EMA, scaler, counters and the
process RNG. Data order and all per-row randomness are functions of the step, so nothing of the loader needs saving.
Only safetensors, JSON and `torch.load(weights_only=True)`: no pickle is executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmalign.run.atomic import atomic_folder


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or does not fit. The message says what is intact and what to do."""


@dataclass
class LoopState:
    """Counters of the loop, as JSON. `pending` are metric sums since the last logged line, `averages` of the stop rule."""

    step: int = 0
    rows_seen: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    pending: dict[str, float] = field(default_factory=dict)
    pending_counts: dict[str, int] = field(default_factory=dict)
    stop_average: float | None = None
    reference: str = ""
    encoders: str = ""
    data: str = ""
    code: dict[str, str] = field(default_factory=dict)


@dataclass
class Trainable:
    """What is saved and restored together."""

    parameters: Sequence[tuple[str, torch.nn.Parameter]]
    optimizer: Any
    scheduler: Any
    ema: Any = None
    scaler: Any = None


def save(folder: Path, state: LoopState, trainable: Trainable, *, keep: int) -> Path:
    """Write `folder/step_N` atomically, then drop all but the `keep` newest.

    Raises `CheckpointError` when it cannot be written; what was there before stays.
    """
    target = folder / f"step_{state.step}"
    if (target / "state.json").is_file():  # never replaced: a kill between two renames would leave none
        return target
    try:
        with atomic_folder(target) as temporary:
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable.parameters}
            save_file(tensors, temporary / "weights.safetensors")
            torch.save(trainable.optimizer.state_dict(), temporary / "optimizer.pt")
            torch.save(trainable.scheduler.state_dict(), temporary / "scheduler.pt")
            torch.save(_rng_state(), temporary / "rng.pt")
            if trainable.ema is not None:
                names = [name for name, _ in trainable.parameters]
                shadow = zip(names, trainable.ema.shadow_params, strict=True)
                save_file({n: p.detach().cpu().contiguous() for n, p in shadow}, temporary / "ema.safetensors")
                (temporary / "ema.json").write_text(json.dumps({"optimization_step": trainable.ema.optimization_step}))
            if trainable.scaler is not None:
                (temporary / "scaler.json").write_text(json.dumps(trainable.scaler.state_dict()))
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=2))
    except Exception as error:  # torch, safetensors and the OS each raise their own type on a full disk
        raise not_written(f"the checkpoint of step {state.step}", folder, error) from error
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def not_written(what: str, checkpoints: Path, error: BaseException) -> CheckpointError:
    """The error for a file of the run that the disk did not take: what is intact, how much room is left, what to do."""
    newest = latest(checkpoints)
    kept = f"the newest complete checkpoint is {newest}" if newest else "there is no complete checkpoint yet"
    free = shutil.disk_usage(checkpoints.parent).free / 2**20
    reason = str(error).partition("\n")[0]  # torch appends a C++ stack
    return CheckpointError(
        f"{what} could not be written below {checkpoints.parent} ({free:.0f} MiB free): {reason}; {kept}. "
        f"Free some space and start the same command again"
    )


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step_*") if p.name[5:].isdigit() and (p / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest(folder: Path) -> Path | None:
    found = complete(folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> LoopState:
    """Raises `CheckpointError` if the file is damaged."""
    with _explained(checkpoint):
        return LoopState(**json.loads((checkpoint / "state.json").read_text()))


def check_belongs(saved: LoopState, now: LoopState, checkpoint: Path) -> None:
    """Raises `CheckpointError` if base model, encoders, data or the user's own code are not those of the checkpoint."""
    for what, found, expected in (
        ("base model's weights or settings", saved.reference, now.reference),
        ("frozen encoders", saved.encoders, now.encoders),
        ("training data", saved.data, now.data),
    ):
        if found != expected:
            raise CheckpointError(
                f"{checkpoint} belongs to other {what} (fingerprint {found}, now {expected}): what the same path holds, "
                f"or the library that reads it, has changed. Give a new output_dir, or put the old {what} back"
            )
    for file, digest in now.code.items():
        if saved.code.get(file, digest) != digest:
            raise CheckpointError(
                f"{checkpoint} was trained with another content of {file} (fingerprint {saved.code[file]}, now {digest}): "
                f"it would not continue the same run. Give a new output_dir, or put the old file back"
            )


def restore(checkpoint: Path, trainable: Trainable) -> LoopState:
    """Load everything back in place.

    Raises `CheckpointError` if a file is damaged or the weights do not fit the network.
    """
    with _explained(checkpoint):
        return _restore(checkpoint, trainable)


@contextmanager
def _explained(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each format raises its own types on a damaged file
        older = [path for path in complete(checkpoint.parent) if path != checkpoint]
        goes_on = f"continue from {older[-1]}" if older else "start anew"
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{checkpoint} is damaged ({type(error).__name__}: {reason}). Delete this folder to {goes_on}"
        ) from error


def _restore(checkpoint: Path, trainable: Trainable) -> LoopState:
    tensors = load_file(checkpoint / "weights.safetensors")
    names = [name for name, _ in trainable.parameters]
    if set(tensors) != set(names):
        missing, extra = sorted(set(names) - set(tensors))[:3], sorted(set(tensors) - set(names))[:3]
        raise CheckpointError(
            f"{checkpoint} does not fit this network (missing {missing}, unexpected {extra}). Give a new output_dir"
        )
    other = [name for name, parameter in trainable.parameters if tensors[name].shape != parameter.shape]
    if other:
        raise CheckpointError(
            f"{checkpoint} does not fit this network: {other[0]} is {tuple(tensors[other[0]].shape)} there. "
            f"Give a new output_dir"
        )
    with torch.no_grad():
        for name, parameter in trainable.parameters:
            parameter.copy_(tensors[name])
    trainable.optimizer.load_state_dict(_load(checkpoint / "optimizer.pt"))
    trainable.scheduler.load_state_dict(_load(checkpoint / "scheduler.pt"))
    if trainable.ema is not None:
        shadow = load_file(checkpoint / "ema.safetensors")
        for (name, _), average in zip(trainable.parameters, trainable.ema.shadow_params, strict=True):
            average.data.copy_(shadow[name])
        trainable.ema.optimization_step = json.loads((checkpoint / "ema.json").read_text())["optimization_step"]
    if trainable.scaler is not None and (checkpoint / "scaler.json").is_file():
        trainable.scaler.load_state_dict(json.loads((checkpoint / "scaler.json").read_text()))
    rng = _load(checkpoint / "rng.pt")
    torch.set_rng_state(rng["torch"])
    if torch.cuda.is_available() and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    return read_state(checkpoint)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
