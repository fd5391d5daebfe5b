"""kill -9 while an online run samples, scores or updates, on another number of processes too: the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmalign
from mmalign import registry
from mmalign.config import load_config
from mmalign.data.groups import Groups
from mmalign.data.load import load_rows
from mmalign.run.checkpoint import complete

from .online import FLOW, online_config, write_rewards

STEPS = 6


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step}" / "weights.safetensors")


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def start(config: Path, num_processes: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmalign", "train", str(config)]
    if num_processes > 1:
        options = (
            f"--multi_gpu --num_processes {num_processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
        )
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
        command = [*launcher, "-m", "mmalign", "train", str(config)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=config.parent, env=environment
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def wait_until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if ready():
            return
        time.sleep(0.002)
    pytest.fail(f"the moment did not come: {process.stdout.read() if process.stdout else ''}")


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def num_calls(folder: Path) -> int:
    path = folder / "calls.txt"
    return path.stat().st_size if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a finished run: two updates per rollout, a checkpoint after each iteration."""
    folder = tmp_path_factory.mktemp("whole")
    config = online_config(
        folder,
        [f"{write_rewards(folder)}:slow_red"],
        train={"steps": STEPS, "ema": {"decay": 0.9}},
        checkpoint={"every": 1},
        output_dir=str(folder / "whole"),
    )
    mmalign.train(config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["rollout", "reward", "update"])
def test_killed_in_any_phase_ends_with_the_same_bits(whole: dict[str, Any], phase: str):
    """Killed in the second iteration."""
    uninterrupted = Path(whole["output_dir"])
    folder = uninterrupted.parent
    (folder / "calls.txt").unlink()
    killed = folder / phase
    config = folder / f"{phase}.yaml"
    config.write_text(yaml.safe_dump({**whole, "output_dir": str(killed)}))
    process = start(config)
    metrics = killed / "metrics.jsonl"
    # 4 micro-batches are scored per iteration, 0.4 s each, by one worker; 2 lines are logged per iteration.
    moments = {
        "rollout": lambda: num_calls(folder) >= 5,  # the first micro-batch is drawn, three are to come
        "reward": lambda: num_calls(folder) >= 7,
        "update": lambda: num_lines(metrics) == 3,
    }
    wait_until(process, moments[phase])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in complete(killed / "checkpoints")] == ["step_2"]
    output = finish(start(config))
    assert "resumed from" in output
    assert_same_bits(uninterrupted, killed)
    assert [line["step"] for line in logged(killed)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_ends_the_iteration_writes_a_checkpoint_and_the_next_start_continues(tmp_path: Path):
    """As a cluster's scheduler stops a job: in the middle of the second iteration's sampling, no checkpoint yet."""
    rewards = write_rewards(tmp_path)
    whole = online_config(tmp_path, [f"{rewards}:slow_red"], train={"steps": STEPS}, output_dir=str(tmp_path / "whole"))
    mmalign.train(whole)
    (tmp_path / "calls.txt").unlink()
    stopped = tmp_path / "stopped"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**whole, "output_dir": str(stopped)}))
    process = start(config)
    wait_until(process, lambda: num_calls(tmp_path) == 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    assert "SIGTERM: finishing this step" in output
    summary = json.loads((stopped / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 4)
    assert [path.name for path in complete(stopped / "checkpoints")] == ["step_4"]
    mmalign.train({**whole, "output_dir": str(stopped)})
    assert_same_bits(tmp_path / "whole", stopped)


def assert_same_bits(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[:3]}"


@pytest.mark.slow
def test_two_processes_equal_one_and_a_run_moves_between_them(tmp_path: Path):
    """Flow model, groups that straddle processes, a reward that is NaN for some samples; then 2 -> 1 and 1 -> 2."""
    rewards = write_rewards(tmp_path)
    moderate = {"steps": 4, "learning_rate": 1e-4, "epsilon": 1e-3}  # Adam's sign of a tiny gradient is rounding
    method = {**FLOW["method"], "clip_range": 0.5}  # and a clip that rounding cannot cross

    def config(name: str, steps: int) -> dict:
        made = online_config(
            tmp_path,
            [f"{rewards}:coarse_red", {"name": f"{rewards}:moody", "weight": 0.3}],
            model=FLOW["model"],
            method=method,
            train={**moderate, "steps": steps},
            checkpoint={"every": 2, "keep": 5},
            output_dir=str(tmp_path / name),
        )
        made["model"] = FLOW["model"]
        return made

    def run(name: str, steps: int, num_processes: int) -> Path:
        if num_processes == 1:
            mmalign.train(config(name, steps))
        else:
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(config(name, steps)))
            finish(start(path, num_processes))
        return tmp_path / name

    one, two = run("one", 4, 1), run("two", 4, 2)
    for first, second in zip(logged(one), logged(two), strict=True):
        assert second["invalid_share"] == first["invalid_share"]
        for name in ("loss", "reward", "grad_norm", "ratio"):
            assert second[name] == pytest.approx(first[name], rel=1e-6, abs=1e-6), (name, first["step"])
    failed = [(run / "reward_failures.jsonl").read_text() for run in (one, two)]
    assert failed[0] == failed[1]
    missing = [json.loads(line) for line in failed[1].splitlines()]
    shows = []
    for iteration in (0, 1):
        ranks = shares(config("two", 4), iteration)
        invalid = {line["sample"] for line in missing if line["iteration"] == iteration}
        on_one_rank = sum(bool(invalid & rank.keys()) for rank in ranks) == 1
        straddling = set.intersection(*(set(rank.values()) for rank in ranks))
        shows.append(on_one_rank and any(rank.get(sample) in straddling for rank in ranks for sample in invalid))
    assert any(shows), "no iteration has a NaN on one rank alone, in a group that straddles them: the test shows less"
    assert worst(one, two, 4) < 1e-6

    # 2 -> 1 and 1 -> 2, extended from step 4 to step 6 by the other number of processes
    run("one", 6, 2)
    run("two", 6, 1)
    straight = run("straight", 6, 1)
    assert worst(straight, one, 6) < 1e-6
    assert worst(straight, two, 6) < 1e-6


def shares(config: dict, iteration: int) -> list[dict[int, int]]:
    """The group of every sample that each of two ranks draws."""
    loaded = load_config(config).config
    method = registry.resolve("method", "grpo")(**loaded.method.options())
    rows = load_rows(loaded.data, seed=loaded.train.seed).rows
    return [
        {
            sample.index: sample.group
            for micros in Groups.of(method, rows, None, loaded.train, rank=rank, world_size=2).mine(iteration)
            for samples in micros
            for sample in samples
        }
        for rank in (0, 1)
    ]


@pytest.mark.slow
def test_a_reward_that_breaks_on_one_rank_ends_both_with_a_checkpoint(tmp_path: Path):
    """In the second iteration, no checkpoint due: neither process waits for the other, and nothing trained is lost."""
    settings = online_config(tmp_path, [f"{write_rewards(tmp_path)}:fragile"], train={"steps": 4})
    (tmp_path / "broken.txt").write_text("short")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    process = start(config, 2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode not in (0, None), output
    assert output.count("a checkpoint of step 2 is written") == 2, output
    assert [path.name for path in complete(tmp_path / "run" / "checkpoints")] == ["step_2"]
    (tmp_path / "broken.txt").unlink()
    assert "resumed from" in finish(start(config, 2))
    assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2, 3, 4]


def worst(first: Path, second: Path, step: int) -> float:
    a, b = weights(first, step), weights(second, step)
    return max(float((a[name] - b[name]).abs().max()) for name in a)
