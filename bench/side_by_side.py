"""Our training loop and another procedure, timed against each other in one process in alternating blocks.

The loop is `mmalign.trainers.offline.train` itself, untouched: between two blocks of its steps, at the moment it asks
for its next batch, the other procedure runs a block on the same network, reference and optimizer. A block of ours thus
holds everything a step costs, from making the batch to the logged line. A machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import models
import torch
from rich.console import Console
from rich.table import Table

from mmalign.config import load_config
from mmalign.run.session import Session
from mmalign.trainers import offline

WARM_UP_STEPS = 2


@dataclasses.dataclass(frozen=True)
class Block:
    """Seconds per step: wall time, and processor time of all threads, which a busy machine disturbs less."""

    wall: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """Blocks of both procedures in the order they ran, and the FLOPs of one step of each."""

    ours: list[Block]
    other: list[Block]
    ours_flops: int
    other_flops: int

    def ratios(self, clock: str = "wall") -> list[float]:
        """Seconds of ours over seconds of the other, pair by pair."""
        return [getattr(a, clock) / getattr(b, clock) for a, b in zip(self.ours, self.other, strict=True)]


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Args:
        ratio: median of the per-pair ratios; `low` and `high` are their quartiles.
        cpu_ratio: the same median in processor time.
        ours_seconds, other_seconds: median wall time of a step.
        at_most, at_least: the target, None for a line that has none.
    """

    name: str
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    num_pairs: int
    ours_seconds: float
    other_seconds: float
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most} {'met' if self.ratio <= self.at_most else 'missed'}"
        if self.at_least is not None:
            return f">= {self.at_least} {'met' if self.ratio >= self.at_least else 'missed'}"
        return ""

    @classmethod
    def slowdown(cls, name: str, timing: Timing, **fields: Any) -> Result:
        """How many times longer ours takes."""
        return cls._of(name, timing, [timing.ratios(clock) for clock in ("wall", "cpu")], **fields)

    @classmethod
    def speedup(cls, name: str, timing: Timing, *, over: float = 1.0, **fields: Any) -> Result:
        """How many times longer the other takes, as a multiple of `over`."""
        return cls._of(name, timing, [[1 / (r * over) for r in timing.ratios(c)] for c in ("wall", "cpu")], **fields)

    @classmethod
    def _of(cls, name: str, timing: Timing, ratios: list[list[float]], **fields: Any) -> Result:
        wall, cpu = ratios
        low, middle, high = quartiles(wall)
        return cls(
            name=name,
            ratio=middle,
            low=low,
            high=high,
            cpu_ratio=statistics.median(cpu),
            num_pairs=len(wall),
            ours_seconds=statistics.median(block.wall for block in timing.ours),
            other_seconds=statistics.median(block.wall for block in timing.other),
            **fields,
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Measured(Exception):  # noqa: N818 (not an error: leaves the loop without a checkpoint and an export)
    """All blocks are done."""


@contextlib.contextmanager
def workplace(size: models.Size) -> Iterator[Path]:
    """A temporary folder that holds the pipeline of `size`, the cache and the runs."""
    with tempfile.TemporaryDirectory(prefix="mmalign-bench-") as name:
        models.make_pipeline(size, Path(name))
        yield Path(name)


def run_config(size: models.Size, folder: Path, *, lora: bool) -> dict[str, Any]:
    """A Diffusion-DPO run on drawn pairs, defaults wherever a user would have them."""
    return {
        "model": {
            "family": "sdxl",
            "path": str(folder / f"sdxl-{size.name}"),
            "dtype": size.dtype,
            # Not `auto`: FLOPs inside xformers' kernels cannot be counted.
            "attention": "sdpa",
            "lora": {"rank": models.LORA_RANK} if lora else None,
        },
        "method": {"preset": "diffusion_dpo"},
        "data": {
            "path": "builtin:synthetic",
            "format": "synthetic",
            "options": {"num_pairs": 8 * size.batch_size, "size_px": size.resolution},
            "resolution": size.resolution,
            "cache_dir": str(folder / "cache"),
        },
        # The learning rate is next to nothing, so that both procedures see the weights of the first step to the last:
        # a loss driven into saturation would fill the gradients with denormals, which are slow.
        "train": {"steps": 10**6, "batch_size": size.batch_size, "learning_rate": 1e-12},
        "run": {"preflight": False, "tracker": size.tracker},
        "output_dir": str(folder / f"run-{time.monotonic_ns()}"),
    }


def side_by_side(
    config: dict[str, Any],
    make_other: Callable[[Session, Any, Any], Any],
    size: models.Size,
    warm_up_steps: int = WARM_UP_STEPS,
) -> Timing:
    """Time `train(config)` against another procedure.

    Args:
        config: of our run.
        make_other: called with (session, policy, batches) once these are set up; returns a function that does one
            optimizer step on the same policy and returns its loss.
        size: how often to alternate.
        warm_up_steps: untimed steps of each side before the first block.
    """
    ours: list[Block] = []
    other: list[Block] = []
    counted: list[int] = []

    class Alternating(Session):
        def load_data(self, policy: Any, method: Any) -> Any:
            batches = super().load_data(policy, method)
            iterate = batches.iterate
            batches.iterate = lambda first, last: self.alternate(policy, batches, iterate(first, last))
            return batches

        def alternate(self, policy: Any, batches: Any, stream: Iterator[Any]) -> Iterator[Any]:
            step = make_other(self, policy, batches)
            # Entered here and left when the loop asks for its second batch: counts exactly one step of the loop.
            with models.FlopCounterMode(display=False) as counter:
                yield next(stream)
            counted.extend([counter.get_total_flops(), models.flops(step)])
            for _ in range(warm_up_steps):
                yield next(stream)
                step()
            for _ in range(size.num_pairs):
                clock = Clock(policy.device)
                for _ in range(size.steps_per_block):
                    yield next(stream)
                ours.append(clock.block(size.steps_per_block))
                clock = Clock(policy.device)
                for _ in range(size.steps_per_block):
                    step()
                other.append(clock.block(size.steps_per_block))
            raise Measured

    quiet = contextlib.redirect_stdout(io.StringIO())
    with patch.object(offline, "Session", Alternating), quiet, contextlib.suppress(Measured):
        offline.train(load_config(config))
        raise KeyboardInterrupt  # the loop ends by itself only when it was interrupted
    return Timing(ours, other, *counted)


class Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._wait()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def block(self, num_steps: int) -> Block:
        self._wait()
        return Block((time.perf_counter() - self.wall) / num_steps, (time.process_time() - self.cpu) / num_steps)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reference_network(policy: Any) -> Any:
    """The frozen network of full fine-tuning, None with LoRA, where the reference is the policy without its adapter."""
    return None if policy.config.lora is not None else policy.views.reference()


def check_same_work(ours: float, expected: float) -> None:
    """Raises `RuntimeError` when two procedures that should do the same network passes do not."""
    if abs(ours / expected - 1) > 0.01:
        raise RuntimeError(f"the loop computes {ours:.4g} FLOPs per step where {expected:.4g} were expected")


def print_results(results: list[Result], title: str, notes: list[str]) -> None:
    """The one table."""
    table = Table(title=title, title_justify="left")
    for heading, justify in (
        ("benchmark", "left"),
        ("ratio", "right"),
        ("quartiles", "right"),
        ("cpu-time ratio", "right"),
        ("target", "right"),
        ("ours s", "right"),
        ("other s", "right"),
        ("pairs", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)
    for r in results:
        table.add_row(
            r.name,
            f"{r.ratio:.3f}",
            f"{r.low:.3f} … {r.high:.3f}",
            f"{r.cpu_ratio:.3f}",
            r.verdict,
            f"{r.ours_seconds:.3f}",
            f"{r.other_seconds:.3f}",
            str(r.num_pairs),
        )
    console = Console(width=140)
    console.print(table)
    for note in [*(f"{r.name}: {r.note}" for r in results if r.note), *notes]:
        console.print(note, highlight=False, soft_wrap=True)


def parser(description: str) -> argparse.ArgumentParser:
    """The options all benchmarks share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--size", choices=sorted(models.SIZES), default="small", help="sdxl needs a large GPU")
    result.add_argument("--quick", action="store_true", help="the same as --size quick: does it run?")
    result.add_argument("--pairs", type=int, help="alternations of the two procedures")
    result.add_argument("--variant", choices=["lora", "full"], help="only one of the two")
    return result


def chosen_size(options: argparse.Namespace) -> models.Size:
    size = models.SIZES["quick" if options.quick else options.size]
    return dataclasses.replace(size, num_pairs=options.pairs) if options.pairs else size


def chosen_variants(options: argparse.Namespace) -> tuple[str, ...]:
    return (options.variant,) if options.variant else ("lora", "full")
