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
from PIL import Image
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


LLAVA = {
    "model": {"family": "llava", "path": "builtin:llava-tiny", "lora": {"rank": 4, "targets": "all"}},
    "data": {"path": "builtin:llava-pairs", "format": "trl", "limit": 24},
    "method": {"preset": "mdpo"},
}
SDXL = {
    "data": {"cache_reference": 2, "flip": True, "prompt_dropout": 0.2},
    "method": {"losses": [{"name": "dpo", "beta": 10}]},  # beta multiplies the rounding of scores
}
EVALUATE = {
    "sdxl": {
        "prompts": "builtin:attributes_dev",
        "limit": 1,
        "seeds": 1,
        "num_steps": 2,
        "rewards": ["synthetic_truth"],
    },
    "llava": {"prompts": "builtin:scenes_dev", "limit": 2, "seeds": 1, "rewards": ["synthetic_answers"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "llava"])
def test_two_processes_equal_one_and_a_run_moves_between_them(tiny: Callable, tmp_path: Path, family: str):
    """Losses, gradients and weights, step by step; the report is written once; 2 -> 1 and 1 -> 2 go on exactly."""

    def config(name: str, steps: int, num_processes: int) -> dict:
        train = {
            "steps": steps,
            "batch_size": 2,
            "accumulate": 4 // num_processes,
            "learning_rate": 1e-4,
            "epsilon": 1e-3,
        }
        sections = SDXL if family == "sdxl" else {}
        made = tiny(**sections, train=train, checkpoint={"every": 3, "keep": 5}, output_dir=str(tmp_path / name))
        if family == "llava":
            made = {**made, **LLAVA, "data": {**LLAVA["data"], "cache_dir": str(tmp_path / f"cache-{name}")}}
        if name == "two":
            made["evaluate"] = EVALUATE[family]
        return made

    def run(name: str, steps: int, num_processes: int) -> str:
        settings = config(name, steps, num_processes)
        if num_processes == 1:
            mmalign.train(settings)
            return ""
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        finished = launch(path, num_processes)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    def worst(first: str, second: str, step: int) -> float:
        a, b = (
            load_file(tmp_path / name / "checkpoints" / f"step_{step}" / "weights.safetensors")
            for name in (first, second)
        )
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    run("one", 3, 1)
    assert run("two", 3, 2).count("finished at step 3") == 1
    assert (tmp_path / "two" / "report.json").is_file()
    for first, second in zip(lines("one"), lines("two"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-6)
    assert worst("one", "two", 3) < 1e-6

    with pytest.raises(CheckpointError, match="another number of processes"):
        mmalign.train(config("two", 6, 2))
    run("one", 6, 2)
    run("two", 6, 1)
    run("straight", 6, 1)
    assert worst("straight", "one", 6) < 1e-6
    assert worst("straight", "two", 6) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "llava"])
def test_what_is_cut_is_counted_over_the_rows_of_all_processes(tiny: Callable, tmp_path: Path, capsys, family: str):
    """Each process reads a share of the rows."""

    def config(name: str) -> dict:
        if family == "llava":
            made = tiny(LLAVA, method={"preset": "dpo"}, data={"options": {}})
            made["data"].update(max_length=30, truncation="response", on_bad_row="skip")
        else:
            prompts = [{"id": str(n), "prompt": " ".join(["red"] * (10 + 4 * n))} for n in range(8)]
            pairs = [{**each, "chosen": "white.png", "rejected": "black.png"} for each in prompts]
            for colour in ("white", "black"):
                Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
            (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
            made = tiny(data={"path": str(tmp_path / "pairs.jsonl"), "format": "jsonl", "options": {}})
        made["data"]["cache_dir"] = str(tmp_path / f"cache-{name}")
        return {**made, "train": {**made["train"], "steps": 0}, "output_dir": str(tmp_path / name)}

    mmalign.train(config("one"))
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(config("two")))
    finished = launch(path, 2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (alone,), (together,) = (
        [line for line in text.splitlines() if " cut" in line] for text in (capsys.readouterr().out, finished.stdout)
    )
    assert alone == together
    assert ("4 prompts longer" in alone) if family == "sdxl" else ("responses or histories cut" in alone)


@pytest.mark.slow
def test_the_main_process_tries_the_evaluation_out_and_its_mistake_ends_all(tiny: Callable, tmp_path: Path):
    (tmp_path / "broken.py").write_text("class Broken:\n    def __init__(self): print('loading', 1 / 0)\n")
    (tmp_path / "broken.py").open("a").write("    def __call__(self, images): return [0.0] * len(images)\n")
    evaluate = {**EVALUATE["sdxl"], "rewards": [f"{tmp_path / 'broken.py'}:Broken"]}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(tiny(train={"steps": 1}, evaluate=evaluate, output_dir=str(tmp_path / "two"))))
    failed = launch(path, 2)
    output = " ".join((failed.stdout + failed.stderr).split())
    assert failed.returncode != 0
    assert output.count("cannot be created: ZeroDivisionError") == 1, output
    assert not (tmp_path / "two").exists()
