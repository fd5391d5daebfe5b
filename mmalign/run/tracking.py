"""Metrics: metrics.jsonl and a tracker.

Values stay on the device until a line is due; then everything since the last line crosses in one transfer.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.run.atomic import write_text

logger = logging.getLogger(__name__)

PACKAGES = ("wandb", "trackio")
"""Trackers that are packages of their own, which mmalign does not depend on."""


class Meter:
    """Sums of metrics since the last line, kept on the device.

    A metric that only some steps have (a watched reward that failed once) is averaged over those steps.
    """

    def __init__(self, pending: Mapping[str, float], counts: Mapping[str, int]) -> None:
        self._sums: dict[str, Tensor] = {name: torch.tensor(v, dtype=torch.float64) for name, v in pending.items()}
        # Restored sums stay float64 on the CPU until the first new value shows which device and type is used.
        self.counts: dict[str, int] = dict(counts)
        self._seen: set[str] = set()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add scalars that are already this step's share of a mean."""
        for name, value in metrics.items():
            value = value.detach()
            value = value if value.device.type == "mps" else value.double()  # no float64 there
            self._sums[name] = self._sums[name].to(value) + value if name in self._sums else value
            self._seen.add(name)

    def end_step(self) -> None:
        """What was added since the last call is one optimizer step's."""
        for name in self._seen:
            self.counts[name] = self.counts.get(name, 0) + 1
        self._seen.clear()

    def pending(self, reduce: Any = None) -> dict[str, float]:
        """The sums as numbers (one transfer), for a checkpoint; `reduce` averages a tensor over processes."""
        if not self._sums:
            return {}
        values = torch.stack([value.to(next(iter(self._sums.values()))) for value in self._sums.values()])
        if reduce is not None:
            values = reduce(values)
        return dict(zip(self._sums, values.tolist(), strict=True))

    def flush(self, reduce: Any = None) -> dict[str, float]:
        """Means over the steps since the last flush; `reduce` averages a tensor over processes."""
        names = list(self._sums)
        values = torch.stack([self._sums[name].float().to(self._sums[names[0]].device) for name in names])
        if reduce is not None:
            values = reduce(values)
        means = {name: value / self.counts[name] for name, value in zip(names, values.tolist(), strict=True)}
        self._sums, self.counts = {}, {}
        return means


def check_finite(means: Mapping[str, float], step: int) -> None:
    """Raises `FloatingPointError` before a poisoned state can reach a checkpoint."""
    bad = [f"{name} = {value}" for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"step {step}: {', '.join(bad)} since the last logged line. The checkpoints written so far are from before. "
            f"Lower train.learning_rate, set train.max_grad_norm, or use model.dtype=bf16 instead of fp16"
        )


class Tracker:
    """metrics.jsonl always; TensorBoard, Weights & Biases or trackio beside it."""

    def __init__(self, folder: Path, kind: str, config: dict[str, Any], *, resumed_at: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._truncate(resumed_at)
        self._file = self.path.open("a", encoding="utf-8")
        self._tracker: Any = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tracker = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        elif kind in PACKAGES:
            self._module = _import_tracker(kind)
            identity = _tracker_id(folder, resumed_at)
            # trackio resumes by name, wandb by id.
            names = {"name": folder.name, "id": identity} if kind == "wandb" else {"name": f"{folder.name}-{identity}"}
            self._tracker = self._module.init(project="mmalign", config=config, resume="allow", **names)
        self.kind = kind

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self.kind == "tensorboard":
            for name, value in values.items():
                self._tracker.add_scalar(name, value, step)
        elif self._tracker is not None:
            self._tracker.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        if self.kind == "tensorboard":
            import numpy as np
            from PIL import Image

            self._tracker.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        elif self._tracker is not None:
            self._tracker.log({name: self._module.Image(str(path))}, step=step)

    def close(self) -> None:
        self._file.close()
        if self.kind == "tensorboard":
            self._tracker.close()
        elif self._tracker is not None:
            self._tracker.finish()

    def _truncate(self, step: int) -> None:
        """Drop lines after the checkpoint that is resumed: those steps are about to happen again."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the half-written last line of a killed process
        write_text(self.path, "".join(f"{line}\n" for line in kept))


def _tracker_id(folder: Path, resumed_at: int) -> str:
    """Identity of the run's curves, kept in its folder: a resumed run goes on in them, one from step 0 starts others,
    also where an older run had a folder of the same path."""
    note = folder / "tracker_id"
    if not resumed_at or not note.is_file():
        write_text(note, secrets.token_hex(4))
    return note.read_text(encoding="utf-8")


def check_tracker(kind: str) -> None:
    """Raises `ValueError` when the tracker's package is not installed."""
    if kind in PACKAGES:
        _import_tracker(kind)


def _import_tracker(kind: str) -> Any:
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ValueError(f"run.tracker = {kind!r} needs the package: pip install 'mmalign[tracking]'") from error
