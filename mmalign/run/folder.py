"""The run folder: one run at a time, same config on resume, finished runs say so.

A run that ended before its first checkpoint does not bind the folder to its config: what it left is moved to earlier-N.

Layout: config.yaml (resolved), metrics.jsonl, tracker_id (wandb, trackio), checkpoints/step_N/, final/, samples/, grid.png,
report.html, report.json, summary.json.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmalign.config import Config, ConfigError, LoadedConfig, dump, flatten, to_yaml
from mmalign.run import atomic

# Keys that do not change the trajectory of the weights and may differ when a run is continued.
# `train.accumulate` is checked by what it stands for: the rows of a step must stay the same (`Session.restore`).
FREE_KEYS = ("evaluate", "checkpoint", "run", "output_dir", "data.num_workers", "data.cache_dir", "train.accumulate")

# What a run leaves before its first checkpoint, beside config.yaml; a run of another config starts without it.
BEGUN = ("metrics.jsonl", "reward_failures.jsonl", "samples", "tensorboard", "tracker_id")


@dataclass(frozen=True)
class RunResult:
    """What `mmalign.train` returns. `summary` is the content of summary.json."""

    folder: Path
    summary: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        """report.json, empty when the run had no evaluation."""
        path = self.folder / "report.json"
        return json.loads(path.read_text()) if path.is_file() else {}


class RunFolder:
    """Opens or creates `config.output_dir` and holds its lock until `close`.

    Args:
        loaded: the config of this run.
        is_main: only the main process writes and locks.

    Raises `ConfigError` if the folder belongs to another config, to something else, or to a running process.
    """

    def __init__(self, loaded: LoadedConfig, *, is_main: bool) -> None:
        self.config = loaded.config
        self.path = Path(loaded.config.output_dir).expanduser()
        self.is_main = is_main
        self._lock: Any = None
        self._sets_aside = False
        try:
            self._open()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"output_dir {str(self.path)!r} cannot be written: {error.strerror or error}. "
                f"Give a folder on a disk you may write to"
            ) from error

    def _open(self) -> None:
        found = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir {str(self.path)!r} is a file; give a folder")
        used = found.is_file()
        if not used and self.path.is_dir() and not all(_is_leftover(path.name) for path in self.path.iterdir()):
            raise ConfigError(f"output_dir {str(self.path)!r} is not empty and holds no mmalign run. Give a new folder")
        if used and self.config.run.resume == "never":
            raise ConfigError(
                f"output_dir {str(self.path)!r} already holds a run and run.resume = 'never'. "
                f"Give a new folder, or run.resume=auto to continue"
            )
        if used:
            try:
                check_same_trajectory(found, self.config)
            except ConfigError:
                if self._has_weights():
                    raise
                self._sets_aside = True
        self._made = not self.path.is_dir()
        self._begun = used
        if self.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            atomic.remove_temporary(self.path)
            if self.checkpoints.is_dir():
                atomic.remove_temporary(self.checkpoints)

    def begin(self) -> Path | None:
        """Training is about to start: from here on the folder belongs to this config.

        Returns where the files of another config's run went that was here and left no weights, if there was one.
        """
        aside = None
        if self.is_main:
            if self._sets_aside:
                aside = self._set_aside()
            atomic.write_text(self.path / "config.yaml", to_yaml(self.config))
            self.checkpoints.mkdir(exist_ok=True)
        self._begun = True
        return aside

    def _has_weights(self) -> bool:
        results = (self.path / "final", self.path / "summary.json")
        return any(self.checkpoints.glob("step_*")) or any(path.exists() for path in results)

    def _set_aside(self) -> Path:
        aside = next(path for n in itertools.count(1) if not (path := self.path / f"earlier-{n}").exists())
        aside.mkdir()
        for name in BEGUN:
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)
        # Last, and a copy: whatever interrupts this, the folder still says whose it is.
        shutil.copy2(self.path / "config.yaml", aside / "config.yaml")
        return aside

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def finished(self) -> RunResult | None:
        """The result, if this run has already reached `train.steps` (or its stop rule)."""
        path = self.path / "summary.json"
        if not path.is_file():
            return None
        summary = json.loads(path.read_text())
        if summary["status"] == "stopped" or (
            summary["status"] == "finished" and summary["steps"] >= self.config.train.steps
        ):
            return RunResult(self.path, summary)
        return None

    def close(self) -> None:
        """Release the lock; a folder made for a run that never began goes away again."""
        if self._lock is None:
            return
        (self.path / ".lock").unlink(missing_ok=True)
        self._lock.close()
        self._lock = None
        if self._made and not self._begun and not any(self.path.iterdir()):
            self.path.rmdir()

    def _take_lock(self) -> None:
        self._lock = open(self.path / ".lock", "wb", buffering=0)  # noqa: SIM115 (held for the whole run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise ConfigError(
                f"output_dir {str(self.path)!r} is in use by another running process. Wait for it, or give another folder"
            ) from None
        self._lock.write(str(os.getpid()).encode())


def _is_leftover(name: str) -> bool:
    """Whether a run that was refused or killed before its first step leaves this behind; the next one can use it."""
    return name in (".lock", "bad_rows.jsonl", "reference.safetensors") or name.startswith(atomic.TEMPORARY)


def check_same_trajectory(found: Path, config: Config) -> None:
    """Raise `ConfigError` with the differences if `found` would not lead to the same weights."""
    try:
        old = _comparable(Config.model_validate(yaml.safe_load(found.read_text())))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{found} cannot be read as a run's config: {reason}. Give a new output_dir") from None
    new = _comparable(config)
    differences = [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_free(key, config) and not _more_steps(key, old, new, config)
    ]
    if differences:
        raise ConfigError(
            f"output_dir {str(found.parent)!r} holds a run of another config; it would not continue the same run: "
            f"{'; '.join(differences)}. Give a new output_dir, or the old values"
        )


def _comparable(config: Config) -> dict[str, Any]:
    """Its dotted keys. How long a reward may take changes no score."""
    rewards = [reward.model_copy(update={"timeout": None}) for reward in config.rewards]
    return dict(flatten(dump(config.model_copy(update={"rewards": rewards}))))


def _is_free(key: str, config: Config) -> bool:
    if key == "run.log_every" and config.train.stop is not None:
        return False  # the stop rule looks at logged lines
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _more_steps(key: str, old: dict[str, Any], new: dict[str, Any], config: Config) -> bool:
    return key == "train.steps" and config.train.schedule == "constant" and new[key] >= old[key]
