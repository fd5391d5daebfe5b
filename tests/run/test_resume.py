"""kill -9 at any moment, start the same command again: the weights come out as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmalign
from mmalign.config import ConfigError
from mmalign.run.checkpoint import complete

STEPS = 9
MODELS = {"full": {}, "lora": {"lora": {"rank": 4, "targets": "all"}}}


def final_weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoints" / f"step_{STEPS}" / "weights.safetensors")


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, e.g. {different[:3]}"


def train_settings(accumulate: int) -> dict:
    return {
        "steps": STEPS,
        "batch_size": 2,
        "accumulate": accumulate,
        "schedule": "cosine",
        "warmup_steps": 2,
        "ema": {"decay": 0.9},
    }


def start(config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmalign", "train", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=config.parent)


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Until `step` is logged, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"step {step} was not reached: {process.stdout.read() if process.stdout else ''}")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("model", ["full", "lora"])
def test_killed_run_ends_with_the_same_bits(tiny: Callable, tmp_path: Path, model: str, accumulate: int):
    sections = {
        "model": MODELS[model],
        "data": {"flip": True, "crop": "random", "num_crops": 2, "resolution": 64, "prompt_dropout": 0.2},
        "train": train_settings(accumulate),
        "checkpoint": {"every": 2},
    }
    whole = tiny(**sections, output_dir=str(tmp_path / "whole"))
    mmalign.train(whole)

    config = tmp_path / "config.yaml"
    killed = tmp_path / "killed"
    config.write_text(yaml.safe_dump({**whole, "output_dir": str(killed)}))
    process = start(config)
    wait_for_step(process, killed / "metrics.jsonl", random.randint(3, STEPS - 4))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    assert complete(killed / "checkpoints"), "killed before its first checkpoint"

    again = start(config)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert "resumed from" in output
    assert_identical(final_weights(tmp_path / "whole"), final_weights(killed))
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_writes_a_checkpoint_and_the_next_start_continues(
    tiny: Callable, tmp_path: Path, sent: signal.Signals
):
    whole = tiny(train=train_settings(1), output_dir=str(tmp_path / "whole"))
    mmalign.train(whole)
    config = tmp_path / "config.yaml"
    stopped = tmp_path / "stopped"
    config.write_text(yaml.safe_dump({**whole, "output_dir": str(stopped)}))
    process = start(config)
    wait_for_step(process, stopped / "metrics.jsonl", 2)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert f"{sent.name}: finishing this step" in output
    assert "Start the same command again to continue" in output
    reached = json.loads((stopped / "summary.json").read_text())
    assert reached["status"] == "interrupted"
    assert [int(path.name[5:]) for path in complete(stopped / "checkpoints")] == [reached["steps"]]
    result = mmalign.train({**whole, "output_dir": str(stopped)})
    assert result.summary["status"] == "finished"
    assert_identical(final_weights(tmp_path / "whole"), final_weights(stopped))


def test_finished_run_says_so_and_more_steps_continue(tiny: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = tiny(train={"steps": 2, "batch_size": 2}, output_dir=str(tmp_path / "run"))
    first = mmalign.train(config)
    stamp = (first.folder / "checkpoints" / "step_2" / "state.json").stat().st_mtime_ns
    capsys.readouterr()
    again = mmalign.train(config)
    out = capsys.readouterr().out
    assert "finished" in out
    assert "  no evaluate.prompts: no grid, no report" in out.splitlines()
    assert again.summary == first.summary
    assert (first.folder / "checkpoints" / "step_2" / "state.json").stat().st_mtime_ns == stamp

    longer = tiny(train={"steps": STEPS, "batch_size": 2}, output_dir=str(tmp_path / "run"))
    mmalign.train(longer)
    straight = tiny(train={"steps": STEPS, "batch_size": 2}, output_dir=str(tmp_path / "straight"))
    mmalign.train(straight)
    assert_identical(final_weights(tmp_path / "straight"), final_weights(tmp_path / "run"))


def test_another_config_is_refused_with_the_difference(tiny: Callable, tmp_path: Path):
    run = str(tmp_path / "run")
    mmalign.train(tiny(train={"steps": 1}, output_dir=run))
    with pytest.raises(ConfigError, match=r"train\.learning_rate: 0\.0001 -> 0\.002"):
        mmalign.train(tiny(train={"steps": 1, "learning_rate": 2e-3}, output_dir=run))
    with pytest.raises(ConfigError, match=r"model\.family: 'sdxl' -> 'sd15'"):
        mmalign.train(tiny(model={"family": "sd15", "path": "builtin:sd15-tiny"}, train={"steps": 1}, output_dir=run))
    with pytest.raises(ConfigError, match="resume = 'never'"):
        mmalign.train(tiny(run={"resume": "never"}, train={"steps": 1}, output_dir=run))


def test_what_does_not_change_the_trajectory_may_change(tiny: Callable, tmp_path: Path):
    run = str(tmp_path / "run")
    mmalign.train(tiny(train={"steps": 1}, output_dir=run))
    mmalign.train(tiny(train={"steps": 2}, run={"log_every": 5}, checkpoint={"keep": 1}, output_dir=run))


def test_a_folder_with_other_files_is_not_taken(tiny: Callable, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds no mmalign run"):
        mmalign.train(tiny(output_dir=str(tmp_path / "mine")))
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_two_processes_cannot_share_a_run_folder(tiny: Callable, tmp_path: Path):
    from mmalign.config import load_config
    from mmalign.run.folder import RunFolder

    loaded = load_config(tiny(output_dir=str(tmp_path / "run")))
    first = RunFolder(loaded, is_main=True)
    with pytest.raises(ConfigError, match="in use by another running process"):
        RunFolder(loaded, is_main=True)
    first.close()
    assert not (tmp_path / "run").exists()
