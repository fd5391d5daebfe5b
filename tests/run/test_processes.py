"""Two real processes through `accelerate launch` compute what one computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import mmalign
from mmalign.run.checkpoint import CheckpointError


def launch(config: Path, num_processes: int) -> subprocess.CompletedProcess[str]:
    """`--multi_gpu` selects the launcher that starts several processes; `--cpu` alone would start one."""
    options = f"--multi_gpu --num_processes {num_processes} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *options.split(),
        "-m",
        "mmalign",
        "train",
        str(config),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=config.parent, env=environment, check=False
    )


@pytest.mark.slow
def test_two_processes_equal_one(tiny: Callable, tmp_path: Path):
    """Losses step by step, cached reference included; the report is written once; another process count is refused."""
    data = {"cache_reference": 2, "flip": True, "prompt_dropout": 0.2}
    optimizer = {"steps": 3, "accumulate": 2, "learning_rate": 1e-4, "epsilon": 1e-3}
    evaluate = {
        "prompts": "builtin:attributes_dev",
        "limit": 1,
        "seeds": 1,
        "num_steps": 2,
        "rewards": ["synthetic_truth"],
    }
    method = {"losses": [{"name": "dpo", "beta": 100}]}  # moderate: beta multiplies the rounding of scores
    one = tiny(method=method, data=data, train={**optimizer, "batch_size": 4}, output_dir=str(tmp_path / "one"))
    mmalign.train(one)
    two = tiny(
        method=method,
        data=data,
        train={**optimizer, "batch_size": 2},
        evaluate=evaluate,
        output_dir=str(tmp_path / "two"),
    )
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(two))
    finished = launch(config, 2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("finished at step 3") == 1

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    for first, second in zip(lines("one"), lines("two"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=2e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=2e-4)
    weights = [load_file(tmp_path / name / "checkpoints" / "step_3" / "weights.safetensors") for name in ("one", "two")]
    worst = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    assert worst < 1e-6
    assert (tmp_path / "two" / "report.json").is_file()
    with pytest.raises(CheckpointError, match="another number of processes"):
        mmalign.train({**two, "train": {**two["train"], "steps": 5}})
