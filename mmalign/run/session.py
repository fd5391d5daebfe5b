"""Everything around the loop: set-up, restore, logging, previews, checkpoints, final evidence.

The loop calls these in order and keeps the steps visible; nothing here computes a loss or calls backward.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from mmalign import randomness, registry
from mmalign.config import LOOP_METRICS, Config, ConfigError, LoadedConfig, dump
from mmalign.data.batches import Batches
from mmalign.data.cache import FeatureCache, build_cache, cache_folder
from mmalign.data.features import Features, make_features
from mmalign.data.groups import Groups
from mmalign.data.load import check_rows, content_fingerprint, drop_bad, load_rows, verify_images
from mmalign.policies.load import load_policy
from mmalign.run import atomic, checkpoint, optim
from mmalign.run.checkpoint import LoopState, Trainable
from mmalign.run.environment import make_accelerator, peak_memory, quiet_libraries
from mmalign.run.evidence import Evidence, EvidenceError
from mmalign.run.folder import RunFolder, RunResult
from mmalign.run.phases import Phases
from mmalign.run.preflight import probe
from mmalign.run.preview import draw_preview
from mmalign.run.reference import ReferenceCache, cache_fingerprint, score_reference
from mmalign.run.screen import Screen
from mmalign.run.signals import Interruption
from mmalign.run.stop import StopRule
from mmalign.run.tracking import Meter, Tracker, check_finite, check_tracker
from mmalign.types import Row

AnySession = TypeVar("AnySession", bound="Session")
logger = logging.getLogger("mmalign")
MAX_SKIPPED = 50
SHOWN = ("loss", "implicit_accuracy", "image_accuracy", "reward", "diversity")
SHOWN_SMALL = ("chosen_error_delta", "chosen_logp_delta")
LOOP_PHASES = ("train", "rollout", "reward", "update")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Session:
    """One run from opening its folder to closing it. Use as a context manager."""

    unit = "pairs"
    """What throughput counts."""
    stride = 1
    """Optimizer steps between two moments at which the run can be left."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self.config: Config = loaded.config
        self.accelerator = make_accelerator(self.config.model.dtype)
        self.is_main = self.accelerator.is_main_process
        self.screen = Screen(enabled=self.is_main)
        self.folder = RunFolder(loaded, is_main=self.is_main)
        self.already_finished = self.folder.finished()
        self.interruption = Interruption()
        self.interrupted = self.stopped_by_rule = False
        self.stop_rule = StopRule(self.config.train.stop) if self.config.train.stop is not None else None
        self.evidence = Evidence(self.config)
        self._code = registry.file_digests([self.config.model.family, self.config.method.model_dump()])
        self.phases = Phases()
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.ema: Any = None
        self.tracker: Tracker | None = None
        self._data_fingerprint = ""
        self._reference_fingerprint = ""
        self._reference_idle = False
        self._skipped_in_a_row = 0

    def __enter__(self: AnySession) -> AnySession:
        quiet_libraries()
        self.accelerator.wait_for_everyone()
        if self.already_finished is not None:
            self._say_finished(self.already_finished)
        self.interruption.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problem = error
        try:
            self.screen.close()
            if self.tracker is not None:
                self.tracker.close()
        except OSError as closing:  # on a full disk; what ended the run matters more
            problem = problem or closing
        if isinstance(problem, OSError) and problem.errno in DISK_FULL:
            problem = checkpoint.not_written("a file of the run", self.folder.checkpoints, problem)
        self.interruption.__exit__(kind, error, trace)
        self.folder.close()
        if problem is not None and problem is not error:
            raise problem from error

    @property
    def should_stop(self) -> bool:
        return self.interrupted or self.stopped_by_rule

    # -- set-up ------------------------------------------------------------------------------------------------------

    def load_policy(self) -> Any:
        config = self.config
        with self.phase("load"):
            self._check_evidence()
            policy = load_policy(config.model, data=config.data, device=self.accelerator.device, seed=config.train.seed)
        self._reference_fingerprint = policy.reference_fingerprint()
        trained = sum(parameter.numel() for _, parameter in policy.trainable())
        total = sum(p.numel() for module in policy.modules().values() for p in module.parameters())
        self.say(
            f"{config.model.family} from {config.model.path} on {policy.device}, {config.model.dtype}, "
            f"attention: {policy.attention}; training {trained:,} of {total:,} parameters "
            f"({'LoRA' if config.model.lora else 'full'})"
        )
        return policy

    def _check_evidence(self) -> None:
        """On the main process, which holds the evaluation; its failure ends the others too."""
        failure: Exception | None = None
        if self.is_main:
            try:
                self.evidence.check(self.accelerator.device)
            except Exception as error:
                failure = error
        if self._anyone(failure is not None):
            raise failure or ConfigError("the evaluation cannot be held; the main process says why")

    def load_method(self) -> Any:
        # Before anything is loaded: a package that is missing should not cost a model and a cache.
        optim.check_optimizer(self.config.train)
        check_tracker(self.config.run.tracker)
        config = self.config.method
        return registry.resolve("method", config.name)(**config.options())

    def load_data(self, policy: Any, method: Any) -> Batches:
        """Read and check the rows, encode what is not cached yet."""
        config = self.config
        rows, features = self.rows(policy, method)
        return Batches(
            rows,
            features,
            config.data,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            accumulate=config.train.accumulate,
            num_draws=config.train.num_draws,
            negatives=method.needs_negative,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def rows(self, policy: Any, method: Any) -> tuple[list[Row], Features]:
        """The usable rows of the run and what encodes them, the cache filled."""
        config, seed = self.config, self.config.train.seed
        bad_rows = self.folder.path / "bad_rows.jsonl" if self.is_main else None
        cache = FeatureCache(cache_folder(config.data)) if config.data.cache else None
        negatives, sides = method.needs_negative, method.sides
        with self.phase("data"):
            row_set = load_rows(config.data, seed=seed, bad_rows_path=bad_rows)
            method.check_rows(row_set.rows)
            if cache is None:
                features = make_features(
                    policy, config.data, None, seed=seed, rows=row_set.rows, negatives=negatives, sides=sides
                )
                row_set = check_rows(row_set, features, config.data, bad_rows_path=bad_rows)
                if config.data.on_bad_row == "skip":
                    row_set = verify_images(row_set, features, config.data, bad_rows_path=bad_rows)
        if cache is not None:
            with self.phase("cache"):
                # Each process encodes a slice; together they fill the shared cache.
                report = build_cache(
                    policy,
                    row_set.rows,
                    config.data,
                    cache,
                    seed=seed,
                    share=(self.accelerator.process_index, self.accelerator.num_processes),
                    negatives=negatives,
                    sides=sides,
                    progress=self.screen.progress("encode"),
                )
                self.screen.close()
                bad = gather_object(report.bad) if self.accelerator.num_processes > 1 else report.bad
                row_set = drop_bad(row_set, bad, bad_rows_path=bad_rows)
            policy.release_encoders()  # every prompt of the run is cached, the empty one included
            self.say(f"cache: {report}")
        self._data_fingerprint = row_set.fingerprint
        if cache is not None:
            # With a cache every image has been read: its content counts, not only its name.
            self._data_fingerprint = content_fingerprint(row_set.fingerprint, row_set.rows, cache.digests)
        counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in row_set.counts.items() if value)
        self.say(f"data: {config.data.path}: {counts}{self._cut(policy, row_set.rows)}")
        return row_set.rows, make_features(
            policy, config.data, cache, seed=seed, rows=row_set.rows, negatives=negatives, sides=sides
        )

    def _cut(self, policy: Any, rows: Sequence[Row]) -> str:
        """How many of the rows the model does not see whole, in words."""
        if policy.modality == "image":
            if not self.is_main:
                return ""
            cut = policy.cut_prompts(row.prompt for row in rows)
            many = sum(row.prompt in cut for row in rows)
            return f", {many} prompts longer than any text encoder reads, their ends cut" if many else ""
        truncated = [policy.truncated]  # by this process, in its share of the rows
        if self.accelerator.num_processes > 1:
            truncated = gather_object(truncated)
        many = sum(any(row.id in ids for ids in truncated) for row in rows)
        return f", {many} responses or histories cut to data.max_length" if many else ""

    def cache_reference(self, policy: Any, method: Any, batches: Batches) -> ReferenceCache | None:
        """Build the table of reference scores if `data.cache_reference` asks for it."""
        config, draws = self.config, self.config.data.cache_reference
        self._reference_idle = bool(draws) or not method.needs_reference
        if draws and not method.needs_reference:
            raise ConfigError(
                f"data.cache_reference = {draws} does nothing here: none of the configured losses uses a reference"
            )
        if not draws:
            return None
        fingerprint = cache_fingerprint(
            reference=self._reference_fingerprint,
            encoders=[policy.encode_key("image"), policy.encode_key("prompt")],
            data=self._data_fingerprint,
            seed=config.train.seed,
            draws=(draws, config.train.num_draws),
            # Whatever of the data section changes what a draw shows.
            augmentation=config.data.model_dump(
                exclude={"path", "on_bad_row", "cache", "cache_dir", "cache_reference", "num_workers"}
            ),
            # What is asked for, and how it is scored: timestep density and shift, dtype, guidance …
            model=config.model.model_dump(exclude={"gradient_checkpointing"}),
            method=config.method.model_dump(),
            code=self._code,
        )
        table = ReferenceCache(
            self.folder.path / "reference.safetensors",
            fingerprint,
            num_rows=len(batches.rows),
            num_visits=draws // config.train.num_draws,
            requests_per_row=method.requests_per_row,
        )
        started = time.monotonic()
        with self.phase("reference"):
            built = table.build(
                policy, method, batches, batch_size=config.train.batch_size, progress=self.screen.progress("reference")
            )
            self.screen.close()
            if self.accelerator.num_processes > 1:
                table.merge(lambda part: self.accelerator.reduce(part.to(self.accelerator.device), "sum").cpu())
            if self.is_main:
                table.save()
        if built:
            visits = config.train.steps * batches.rows_per_step
            self.say(
                f"reference: {built} scores in {time.monotonic() - started:.0f} s; pays off after {built} of the "
                f"{visits} row visits of this run"
            )
        policy.release_reference()
        return table

    def restore(self, policy: Any, batches: Batches | Groups) -> LoopState:
        """Optimizer, schedule and EMA; then the newest complete checkpoint, if there is one."""
        config = self.config
        randomness.seed_process(config.train.seed, self.accelerator.process_index)
        parameters = [parameter for _, parameter in policy.trainable()]
        self.optimizer = self.accelerator.prepare(
            optim.make_optimizer(config.train, parameters, policy.device, scaled=self.accelerator.scaler is not None)
        )
        self.scheduler = optim.make_scheduler(config.train, self.optimizer)
        if config.train.ema is not None:
            self.ema = policy.start_ema(config.train.ema)
        encoders = f"{policy.encode_key('image')} {policy.encode_key('prompt')}"
        state = LoopState(
            reference=self._reference_fingerprint, encoders=encoders, data=self._data_fingerprint, code=self._code
        )
        newest = checkpoint.latest(self.folder.checkpoints)
        if newest is not None:
            checkpoint.check_belongs(checkpoint.read_state(newest), state, newest)
            state = checkpoint.restore(newest, self._trainable(policy))
            if state.rows_seen != state.step * batches.rows_per_step:
                raise checkpoint.CheckpointError(
                    f"{newest} was written with {state.rows_seen // state.step} rows per step, this start would use "
                    f"{batches.rows_per_step}: {batches.why_other_rows}"
                )
            self.phases.add(state.seconds)
            self.stopped_by_rule = self.stop_rule is not None and self.stop_rule.reached(state) is not None
            self.say(f"resumed from {newest} (step {state.step} of {config.train.steps})")
        if self.accelerator.num_processes > 1:
            policy.network = self.accelerator.prepare(policy.network)
        return state

    def preflight(
        self, policy: Any, method: Any, batches: Batches, reference: ReferenceCache | None, state: LoopState
    ) -> None:
        """Golden numbers and gradient reach on the first batch of a fresh run."""
        config = self.config
        if state.step or not config.run.preflight or not config.train.steps:
            return
        with self.phase("preflight"):
            batch = batches.make(batches.visits(0, 0))
            reference_R = None
            if method.needs_reference:
                chunk = config.train.score_chunk
                reference_R = reference.get(batch) if reference else score_reference(policy, method, batch, chunk)
            found = probe(
                policy,
                method,
                batch,
                reference_R,
                dtype=config.model.dtype,
                cached=reference is not None,
                chunk=config.train.score_chunk,
            )
        if self.stop_rule is not None:
            self.stop_rule.config.check_metric((*LOOP_METRICS, *found.metrics))
        for line in found.lines():
            self.say(f"preflight: {line}")

    # -- while training ----------------------------------------------------------------------------------------------

    @contextmanager
    def training(self, state: LoopState) -> Iterator[Meter]:
        """From here on the folder holds a run of this config; one that was refused before this leaves no config.yaml."""
        if aside := self.folder.begin():
            self.say(f"a run of another config that left no checkpoint was here; its files are now in {aside}")
        if self.is_main:
            self.tracker = Tracker(self.folder.path, self.config.run.tracker, dump(self.config), resumed_at=state.step)
        self._meter = Meter(state.pending, state.pending_counts)
        self.screen.show("train", state.step, self.config.train.steps)
        self._steps_here, self._rows_at_start = state.step, state.rows_seen
        self._train_started = time.monotonic()
        with self.phase("train"), self.interruption.graceful():
            yield self._meter
        self.screen.close()

    def after_step(
        self, policy: Any, state: LoopState, meter: Meter, norm: Tensor, *, skipped: bool, between: bool = True
    ) -> None:
        """Log, preview, checkpoint: whatever this step number calls for.

        `skipped`: the fp16 scaler dropped this step after an overflow; a few at the start are how it finds its scale.
        `between`: the run can be left here; False inside an online iteration, whose rest would be lost.
        """
        config = self.config
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise FloatingPointError(
                f"step {state.step}: the fp16 gradient overflowed {MAX_SKIPPED} times in a row. Use model.dtype=bf16"
            )
        metrics = {"grad_norm": torch.zeros_like(norm) if skipped else norm}
        if self.accelerator.scaler is not None:
            metrics["step_skipped"] = torch.full_like(norm, float(skipped))
        meter.add(metrics)
        meter.end_step()
        self.interrupted = self._anyone(bool(self.interruption.requested))
        last = state.step == config.train.steps
        due = state.step % config.run.log_every == 0 or last
        self.screen.show("train", state.step, config.train.steps, self._log(state, meter) if due else "")
        if not between:
            return
        # Here alone: a run resumed from the checkpoint of this step decides from the same average.
        if self.stop_rule is not None and (reason := self.stop_rule.reached(state)):
            self.stopped_by_rule = True
            self.say(f"stop rule: {reason} at step {state.step}")
        if self._due(config.evaluate.every, state.step) and not last and config.evaluate.prompts:
            self.preview(policy, state)
        if self._due(config.checkpoint.every, state.step) or last or self.should_stop:
            self.checkpoint(policy, state, meter)

    def _due(self, every: int | None, step: int) -> bool:
        """Whether a multiple of `every` was passed since the run could last be left."""
        return every is not None and step // every > (step - self.stride) // every

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all must leave after the same step, or the others wait forever."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def _log(self, state: LoopState, meter: Meter) -> str:
        """A line for the tracker; returns its gist."""
        reduce = (lambda t: self.accelerator.reduce(t, "mean")) if self.accelerator.num_processes > 1 else None
        means = meter.flush(reduce)
        check_finite(means, state.step)
        if self.stop_rule is not None:
            self.stop_rule.follow(state, means)
        elapsed = time.monotonic() - self._train_started
        means["learning_rate"] = self.scheduler.get_last_lr()[0]
        means[f"{self.unit}_per_second"] = (state.rows_seen - self._rows_at_start) / max(elapsed, 1e-9)
        if self.tracker is not None:
            self.tracker.log(state.step, means)
        shown = [f"{name} {means[name]:.4f}" for name in SHOWN if name in means]
        shown += [f"{name} {means[name]:+.1e}" for name in SHOWN_SMALL if name in means]
        shown.append(f"{means[f'{self.unit}_per_second']:.1f} {self.unit}/s")
        return "  ".join(shown)

    def preview(self, policy: Any, state: LoopState) -> None:
        """A small grid of the first evaluation prompts, on the main process."""
        if not self.is_main:
            return
        with self.phase("preview"):
            path = self.folder.path / "samples" / f"step_{state.step:06d}.png"
            draw_preview(policy, self.config.evaluate, self.trained_view, path, f"step {state.step}")
            assert self.tracker is not None
            self.tracker.image(state.step, "preview", path)
        if self._reference_idle:
            policy.release_reference()  # made for the base images alone
        if self.config.data.cache:
            policy.release_encoders()

    def checkpoint(self, policy: Any, state: LoopState, meter: Meter) -> None:
        reduce = (lambda t: self.accelerator.reduce(t, "mean")) if self.accelerator.num_processes > 1 else None
        state.pending, state.pending_counts = meter.pending(reduce), dict(meter.counts)
        check_finite(state.pending, state.step)
        state.seconds = self.phases.seconds()
        if self.is_main:
            with self.phase("checkpoint"):
                checkpoint.save(
                    self.folder.checkpoints, state, self._trainable(policy), keep=self.config.checkpoint.keep
                )
        self.accelerator.wait_for_everyone()

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self, policy: Any, state: LoopState) -> RunResult:
        """Export, evaluate, summarise; or say how to go on after an interruption."""
        if self.interrupted and state.step < self.config.train.steps:
            self.say(
                f"interrupted at step {state.step} of {self.config.train.steps}; a checkpoint is written. "
                f"Start the same command again to continue"
            )
            return self._summarise(policy, state, "interrupted")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.export(policy)
            self.evaluate(policy, state)
        self.accelerator.wait_for_everyone()
        result = self._summarise(policy, state, "stopped" if self.stopped_by_rule else "finished")
        self._say_finished(result)
        return result

    def export(self, policy: Any) -> None:
        """Write `final/` in the field's format."""
        final = self.folder.path / "final"
        try:
            with self.phase("export"), policy.view(self.trained_view), atomic.atomic_folder(final) as temporary:
                policy.export(temporary)
                self.evidence.withdraw(self.folder.path)
        except (OSError, RuntimeError, SafetensorError) as error:  # each format has its own type for a full disk
            raise checkpoint.not_written("final/ (training is complete)", self.folder.checkpoints, error) from error

    def evaluate(self, policy: Any, state: LoopState) -> None:
        """Base and trained weights side by side, where `evaluate.prompts` asks for it."""
        if self.config.evaluate.prompts is None:
            return
        folder = self.folder.path
        try:
            with self.phase("evaluate"):
                self.evidence.hold(policy, folder, view=self.trained_view, step=state.step, progress=self.screen.show)
                self.screen.close()
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise EvidenceError(
                f"{reason}. The training is complete and its weights are safe in {folder / 'final'}; only the evaluation "
                f"is missing: with this mended, start the same command again, or compare with `mmalign grid {folder}`"
            ) from error

    @property
    def trained_view(self) -> Any:
        return "ema" if self.ema is not None else "policy"

    def _summarise(self, policy: Any, state: LoopState, status: str) -> RunResult:
        seconds = self.phases.seconds()
        looping = sum(seconds.get(name, 0.0) for name in LOOP_PHASES)
        summary: dict[str, Any] = {
            "status": status,
            "steps": state.step,
            "rows_seen": state.rows_seen,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            f"{self.unit}_per_second": round(state.rows_seen / looping, 3) if looping else None,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "device": str(self.accelerator.device),
            "attention": policy.attention,
        }
        if self.is_main:
            atomic.write_json(self.folder.path / "summary.json", summary)
        return RunResult(self.folder.path, summary)

    def _say_finished(self, result: RunResult) -> None:
        folder = result.folder
        self.say(f"{result.summary['status']} at step {result.summary['steps']}: {folder}")
        for name in ("grid.png", "report.html", "final"):
            if (folder / name).exists():
                self.say(f"  {folder / name}")
        report = result.report
        if report:
            self.say(f"  {report['headline']}")
            for warning in report["warnings"]:
                self.say(f"  warning: {warning}")
        elif self.config.evaluate.prompts is None:
            self.say("  no evaluate.prompts: no grid, no report")

    def say(self, text: str) -> None:
        """One line to the user, from the main process."""
        self.screen.say(text)

    # -- small things ------------------------------------------------------------------------------------------------

    def _trainable(self, policy: Any) -> Trainable:
        return Trainable(policy.trainable(), self.optimizer, self.scheduler, self.ema, self.accelerator.scaler)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The block's wall time goes to `summary.seconds[name]`."""
        return self.phases.phase(name)
