"""Run folders that a crash, a user or a changed file left in another state than the run did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mmalign
from mmalign.builtin import builtin_path
from mmalign.config import ConfigError
from mmalign.run.checkpoint import CheckpointError


def test_half_written_checkpoints_are_swept_and_never_resumed(
    tiny: Callable, same_weights: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = mmalign.train(tiny(train={"steps": 2})).folder
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_2", checkpoints / ".tmp-step_3-4711")
    shutil.copytree(checkpoints / "step_2", checkpoints / "step_9")
    (checkpoints / "step_9" / "state.json").unlink()
    (checkpoints / "step_9" / "weights.safetensors").write_bytes(b"torn")
    (run / ".tmp-config.yaml-4711").write_text("half")
    capsys.readouterr()
    mmalign.train(tiny(train={"steps": 3}))
    assert f"resumed from {checkpoints / 'step_2'} (step 2 of 3)" in capsys.readouterr().out
    assert list(run.rglob(".tmp-*")) == []
    mmalign.train(tiny(train={"steps": 3}, output_dir=str(tmp_path / "straight")))
    same_weights(run, tmp_path / "straight", 3)


def test_damaged_newest_checkpoint_is_named_with_the_fix(
    tiny: Callable, same_weights: Callable, refused: Callable, tmp_path: Path
):
    settings = {"ema": {"decay": 0.9}}
    run = mmalign.train(tiny(train={"steps": 2, **settings}, checkpoint={"every": 1})).folder
    newest, previous = run / "checkpoints" / "step_2", run / "checkpoints" / "step_1"
    longer = tiny(train={"steps": 3, **settings})
    for name in ("weights.safetensors", "optimizer.pt", "ema.safetensors", "state.json", "rng.pt"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        refused(longer, CheckpointError, f"{newest} is damaged", f"Delete this folder to continue from {previous}")
        (newest / name).write_bytes(content)
    shutil.rmtree(newest)
    mmalign.train(longer)
    mmalign.train({**longer, "output_dir": str(tmp_path / "straight")})
    same_weights(run, tmp_path / "straight", 3)


def test_missing_file_of_the_only_checkpoint(tiny: Callable, refused: Callable):
    run = mmalign.train(tiny(train={"steps": 1})).folder
    (run / "checkpoints" / "step_1" / "scheduler.pt").unlink()
    says = (str(run / "checkpoints" / "step_1"), "scheduler.pt", "Delete this folder to start anew")
    refused(tiny(train={"steps": 2}), CheckpointError, *says)


def test_model_changed_behind_the_same_path_is_refused(tiny: Callable, refused: Callable, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(builtin_path("builtin:sdxl-tiny"), model)
    mmalign.train(tiny(model={"path": str(model)}, train={"steps": 1}))
    longer = tiny(model={"path": str(model)}, train={"steps": 2})
    for part, says in (
        ("unet/diffusion_pytorch_model", "base model's weights"),
        ("vae/diffusion_pytorch_model", "frozen encoders"),
        ("text_encoder/model", "frozen encoders"),
    ):
        file = model / f"{part}.safetensors"
        content = file.read_bytes()
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)
        tensors[name] = tensors[name] * 1.01
        save_file(tensors, file, metadata={"format": "pt"})
        refused(longer, CheckpointError, f"belongs to other {says}", "Give a new output_dir")
        file.write_bytes(content)
    assert mmalign.train(longer).summary["steps"] == 2


def test_training_data_changed_behind_the_same_path_is_refused(on_pairs: Callable, pairs: Callable, refused: Callable):
    file = pairs()
    mmalign.train(on_pairs(file, train={"steps": 1}))
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"fox 2", b"hare"))
    longer = on_pairs(file, train={"steps": 2})
    refused(longer, CheckpointError, "belongs to other training data", "Give a new output_dir")
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    refused(longer, CheckpointError, "belongs to other training data")
    file.write_bytes(whole)
    assert mmalign.train(longer).summary["steps"] == 2


def test_finished_run_says_where_its_results_are(tiny: Callable, tmp_path: Path, command: Callable):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny(train={"steps": 1})))
    mmalign.train(config)
    code, out, err = command("train", config)
    assert code == 0, err
    assert f"finished at step 1: {tmp_path / 'run'}" in out
    assert str(tmp_path / "run" / "final") in out


def test_damaged_config_of_a_run(tiny: Callable, refused: Callable):
    run = mmalign.train(tiny(train={"steps": 1})).folder
    (run / "config.yaml").write_text("model: [\n")
    refused(tiny(train={"steps": 2}), ConfigError, "cannot be read as a run's config")


def test_metrics_of_a_killed_process_are_mended(tiny: Callable):
    run = mmalign.train(tiny(train={"steps": 2})).folder
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.5}\n{"step": 4, "lo')
    mmalign.train(tiny(train={"steps": 3}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_folder_of_a_run_killed_before_its_first_step_can_be_used(tiny: Callable, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".tmp-config.yaml-4711", "bad_rows.jsonl", "reference.safetensors"):
        (run / name).write_bytes(b"")
    assert mmalign.train(tiny(train={"steps": 1})).summary["status"] == "finished"
    assert not (run / ".tmp-config.yaml-4711").exists()


SD3 = {"family": "sd3", "path": "builtin:sd3-tiny", "lora": {"rank": 2}}
ANSWERS = {
    "model": {"family": "llava", "path": "builtin:llava-tiny"},
    "data": {"path": "builtin:synthetic_answers", "format": "synthetic_answers"},
}


FLOW = {"model": SD3, "method": {"preset": "flow_dpo"}}


@pytest.mark.parametrize(
    ("sections", "before", "after"),
    [
        ({}, {}, {"method": {"guidance_scale": 3.0, "experimental": True}}),
        (FLOW, {"model": {"timestep_shift": 3.0}}, {"model": {"timestep_shift": 1.0}}),
        (FLOW, {"model": {"timestep_density": "uniform"}}, {}),
        # Two requests per row in either case: chosen and rejected, chosen and negative.
        (
            ANSWERS,
            {"method": {"losses": [{"name": "dpo", "beta": 0.1}]}},
            {"method": {"losses": [{"name": "copo", "beta": 0.1}]}},
        ),
    ],
    ids=["guidance", "shift", "density", "kinds"],
)
def test_a_leftover_reference_cache_of_another_run_is_built_anew(
    tiny: Callable, tmp_path: Path, sections: dict, before: dict, after: dict
):
    def train(changes: dict, name: str) -> bytes:
        settings = {"data": {"cache_reference": 1}, "train": {"steps": 1}}
        run = mmalign.train(tiny(settings, sections, changes, output_dir=str(tmp_path / name))).folder
        return (run / "reference.safetensors").read_bytes()

    stale, fresh = train(before, "before"), train(after, "fresh")
    assert stale != fresh
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reference.safetensors").write_bytes(stale)
    assert train(after, "run") == fresh


def test_a_scheduler_changed_behind_the_same_path_is_refused(tiny: Callable, refused: Callable, tmp_path: Path):
    """It decides which timesteps are trained, and what a cached reference score belongs to."""
    path = tmp_path / "model"
    shutil.copytree(builtin_path("builtin:sd3-tiny"), path)
    sections = {"model": {**SD3, "path": str(path)}, "method": {"preset": "flow_dpo"}}
    mmalign.train(tiny(sections, train={"steps": 1}))
    file = path / "scheduler" / "scheduler_config.json"
    original = file.read_text()
    file.write_text(json.dumps({**json.loads(original), "shift": 3.0}))
    longer = tiny(sections, train={"steps": 2})
    refused(longer, CheckpointError, "belongs to other base model's weights or settings", "Give a new output_dir")
    file.write_text(original)
    assert mmalign.train(longer).summary["steps"] == 2


LOSS = """
import torch


def mine(chosen_ratio_B, rejected_ratio_B):
    return -torch.nn.functional.logsigmoid(SIGN * 1000.0 * (chosen_ratio_B - rejected_ratio_B))
"""
METHOD = """
from mmalign.trainers.preference import Preference


class Mine(Preference):
    weight = SIGN
"""


@pytest.mark.parametrize(
    ("source", "method"),
    [(LOSS, {"name": "preference", "losses": [{"name": "FILE:mine"}]}), (METHOD, {"name": "FILE:Mine"})],
    ids=["loss", "method"],
)
def test_own_code_edited_between_two_starts_is_refused(
    tiny: Callable, refused: Callable, tmp_path: Path, source: str, method: dict
):
    file = tmp_path / "mine.py"
    file.write_text(source.replace("SIGN", "1"))
    method = json.loads(json.dumps({"losses": [{"name": "dpo", "beta": 1000}], **method}).replace("FILE", str(file)))
    mmalign.train({**tiny(train={"steps": 1}), "method": method})
    longer = {**tiny(train={"steps": 2}), "method": method}
    file.write_text(source.replace("SIGN", "-1"))
    refused(longer, CheckpointError, f"another content of {file}", "Give a new output_dir, or put the old file back")
    file.write_text(source.replace("SIGN", "1"))
    assert mmalign.train(longer).summary["steps"] == 2


HUNGRY = """
import torch


def hungry(chosen_ratio_B, rejected_ratio_B):
    if len(chosen_ratio_B) > 2 and bool(chosen_ratio_B.any()):  # from the second step on
        raise torch.OutOfMemoryError("CUDA out of memory")
    return -torch.nn.functional.logsigmoid(1000.0 * (chosen_ratio_B - rejected_ratio_B))
"""


def test_a_run_without_a_checkpoint_gives_its_folder_to_another_config(
    tiny: Callable, refused: Callable, tmp_path: Path
):
    file = tmp_path / "hungry.py"
    file.write_text(HUNGRY)
    own = {"method": {"name": "preference", "losses": [{"name": f"{file}:hungry"}]}}
    evaluate = {"prompts": "builtin:attributes_dev", "preview_prompts": 1, "num_steps": 2, "every": 1}
    large = {**tiny(train={"steps": 3, "batch_size": 4}, evaluate=evaluate, run={"tracker": "tensorboard"}), **own}
    small = {**tiny(), **own}
    with pytest.raises(torch.OutOfMemoryError):
        mmalign.train(large)
    run = tmp_path / "run"
    left = {"checkpoints", "config.yaml", "metrics.jsonl", "samples", "tensorboard"}
    assert {path.name for path in run.iterdir()} == left
    logged = (run / "metrics.jsonl").read_bytes()
    (run / "notes.txt").write_text("precious")
    refused({**small, "run": {"resume": "never"}}, ConfigError, "run.resume = 'never'")

    mmalign.train(small)
    # Nothing that was there is gone.
    earlier = run / "earlier-1"
    assert {path.name for path in earlier.iterdir()} == left - {"checkpoints"}
    assert (earlier / "metrics.jsonl").read_bytes() == logged
    assert "batch_size: 4" in (earlier / "config.yaml").read_text()
    other = mmalign.train({**small, "output_dir": str(tmp_path / "other")}).folder
    names = {path.name for path in run.iterdir()} - {"earlier-1", "notes.txt"}
    assert names == {path.name for path in other.iterdir()}
    weights = "checkpoints/step_2/weights.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    refused(large, ConfigError, "train.batch_size: 2 -> 4")
