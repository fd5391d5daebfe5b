"""Trackers, read back from what they leave on disk: each value of metrics.jsonl, and the previews."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmalign


@pytest.fixture
def train(tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Train with a tracker that may write to the temporary folder alone; returns the lines of metrics.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def run(tracker: str, steps: int = 3) -> list[dict[str, Any]]:
        evaluate = {"prompts": "builtin:attributes_heldout", "limit": 1, "seeds": 1, "num_steps": 1, "every": 2}
        config = tiny(
            train={"steps": steps}, evaluate=evaluate, run={"tracker": tracker}, output_dir=str(tmp_path / "run")
        )
        folder = mmalign.train(config).folder
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return run


def test_tensorboard(train: Callable, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = train("tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in lines[0].keys() - {"step"}:
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert [image.step for image in events.Images("preview")] == [2]


def test_wandb_offline(train: Callable, tmp_path: Path):
    wandb = pytest.importorskip("wandb", reason="needs pip install 'mmalign[tracking]'")
    lines = train("wandb")
    wandb.teardown()  # its service process writes on by itself; the end of a command waits for it like this
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    for line in lines:
        for name, value in line.items():
            assert name.encode() in written
            assert json.dumps(value).encode() in written, (name, line["step"])
    assert b"diffusion_dpo" in written, "the config"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/preview_2_*.png"))) == 1


def test_trackio_on_disk_and_a_resumed_run_goes_on_in_its_curves(train: Callable, tmp_path: Path):
    pytest.importorskip("trackio", reason="needs pip install 'mmalign[tracking]'")
    train("trackio", steps=3)
    lines = train("trackio", steps=4)
    (file,) = tmp_path.glob("trackio/*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    (stamp,) = {name.removeprefix("run-") for name, *_ in rows}
    assert stamp == (tmp_path / "run" / "tracker_id").read_text()
    assert len({identity for _, identity, *_ in rows}) == 1
    seen: dict[int, dict[str, Any]] = {}
    for _, _, step, metrics in rows:
        seen.setdefault(step, {}).update(json.loads(metrics))
    image = seen[2].pop("preview")
    assert (tmp_path / "trackio" / "media" / image["file_path"]).is_file()
    assert [{"step": step, **metrics} for step, metrics in seen.items()] == lines

    shutil.rmtree(tmp_path / "run")
    train("trackio", steps=1)
    with sqlite3.connect(file) as database:
        names = database.execute("SELECT run_name, COUNT(DISTINCT run_id) FROM metrics GROUP BY run_name").fetchall()
    assert [count for _, count in names] == [1, 1], "a new run in a folder of the same path has its own curves"
