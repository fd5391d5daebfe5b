"""doctor, explain, grid, data check and data cache, as the commands call them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mmalign
from mmalign.run.comparison import compare
from mmalign.run.doctor import cache_data, check_data, doctor
from mmalign.run.explain import explain

EVALUATE = {
    "prompts": "builtin:attributes_dev",
    "limit": 2,
    "seeds": 1,
    "num_steps": 2,
    "every": 1,
    "preview_prompts": 2,
    "rewards": [{"name": "synthetic_truth", "score": "graded"}],
    "held_out": ["clip", "aesthetic"],
}


@pytest.fixture
def config_file(tiny: Callable, tmp_path: Path) -> Callable[..., Path]:
    def make(*mappings: dict, **sections: object) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tiny(*mappings, **sections)))
        return path

    return make


@pytest.fixture
def long_prompts(tmp_path: Path) -> Path:
    """Three pairs, two of them with a prompt of 40 words: the tiny CLIP encoders read 22."""
    for index in range(3):
        for side, colour in (("w", (60 * index, 0, 0)), ("l", (0, 60 * index, 9))):
            (tmp_path / "pairs" / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), colour).save(tmp_path / "pairs" / side / f"{index}.png")
        (tmp_path / "pairs" / "w" / f"{index}.txt").write_text(" ".join(["red"] * (40 if index else 4)))
    return tmp_path / "pairs"


def test_doctor_reports_environment_golden_numbers_memory_and_data(config_file, capsys):
    assert doctor(str(config_file(model={"lora": {"rank": 4}})), [], as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attention"]["sdpa"]["usable"]
    assert "cpu" in found["attention"]["xformers"]["detail"] or found["attention"]["xformers"]["usable"]
    assert "0.693147" in found["config"]["golden"][0]
    memory = found["config"]["memory"]
    assert memory["gradients"]["bytes"] == 4 * memory["trained weights"]["parameters"]
    assert memory["total"]["bytes"] == pytest.approx(
        sum(part["bytes"] for name, part in memory.items() if name != "total")
    )
    assert "text_encoder (frozen)" in memory  # cached, but on a CPU it stays where it is
    assert "reference copy" not in memory  # LoRA: the reference is the adapter switched off
    assert found["config"]["data"]["counts"]["rows"] == 24
    assert found["problems"] == []


def test_doctor_counts_the_reference_copy_of_full_fine_tuning(config_file, capsys):
    doctor(str(config_file()), [], as_json=True)
    memory = json.loads(capsys.readouterr().out)["config"]["memory"]
    assert memory["reference copy"]["parameters"] == memory["trained weights"]["parameters"]


def test_explain_names_origins_and_the_four_files(config_file, capsys):
    explain(str(config_file()), ["train.steps=7"])
    text = capsys.readouterr().out
    assert "override" in text
    path = text[text.index("path through the code") :]
    for file in ("cli.py", "trainers/offline.py", "trainers/preference.py", "losses/preference.py", "families/sdxl.py"):
        assert f"{file}:" in path


def test_data_check_writes_the_audit_and_data_cache_fills_the_cache(config_file, tmp_path, capsys):
    path = str(config_file(data={"cache_dir": str(tmp_path / "cache")}))
    assert check_data(path, [], tmp_path / "audit.json") == 0
    assert json.loads((tmp_path / "audit.json").read_text())["counts"]["rows"] == 24
    cache_data(path, [])
    assert "encoded" in capsys.readouterr().out
    cache_data(path, [])
    assert " 0 encoded" in capsys.readouterr().out


ONLINE = {"preset": "dance_grpo_ddim", "num_steps": 2, "group_size": 2, "prompts_per_rollout": 1, "guidance_scale": 1.0}


def test_prompts_that_no_text_encoder_reads_whole_are_counted(config_file, long_prompts, capsys):
    data = {"path": str(long_prompts), "format": "auto", "options": {}}
    path = str(config_file(data=data, model={"lora": {"rank": 4}}, train={"steps": 1}))
    assert doctor(path, [], as_json=False) == 0
    assert "data: 2 rows: the prompt is longer than any text encoder reads" in capsys.readouterr().out
    mmalign.train(path)
    assert "3 rows, 2 prompts longer than any text encoder reads" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("sections", "num_images"),
    [
        ({}, 48),
        ({"method": {"preset": "sft"}}, 24),
        ({"method": {"preset": "sft"}, "data": {"swap": True}}, 24),
        ({"method": ONLINE, "rewards": ["synthetic_truth"]}, 0),
    ],
)
def test_data_cache_encodes_what_the_run_reads_and_no_more(config_file, tmp_path, capsys, sections, num_images):
    data = {**sections.get("data", {}), "cache_dir": str(tmp_path / "cache")}
    path = str(config_file({**sections, "data": data}, train={"steps": 1}))
    cache_data(path, [])
    assert f" {num_images} images and" in " ".join(capsys.readouterr().out.split())
    mmalign.train(path)
    assert " 0 encoded" in " ".join(capsys.readouterr().out.split())


def test_a_run_leaves_evidence_and_grid_compares_runs(tiny, tmp_path, capsys):
    runs = []
    for kind, model in (("full", {}), ("lora", {"lora": {"rank": 4}})):
        config = tiny(
            model=model, train={"steps": 2, "batch_size": 4}, evaluate=EVALUATE, run={"tracker": "tensorboard"},
            output_dir=str(tmp_path / kind),
        )  # fmt: skip
        runs.append(mmalign.train(config))
    for run in runs:
        for name in ("grid.png", "report.html", "report.json", "summary.json", "config.yaml", "metrics.jsonl", "final"):
            assert (run.folder / name).exists(), name
        assert (run.folder / "samples" / "step_000001.png").is_file()
        assert list((run.folder / "tensorboard").iterdir())
        assert run.report["rewards"].keys() >= {"synthetic_truth", "clip", "aesthetic"}
        assert run.summary["seconds"]["train"] > 0
        assert run.summary["peak_memory_bytes"] > 0
        assert run.summary["attention"] == "sdpa"
    capsys.readouterr()
    compare(
        str(runs[0].folder),
        vs=[str(runs[1].folder), str(runs[1].folder / "final")],
        prompts="builtin:attributes_heldout",
        seeds=1,
        rewards=["synthetic_truth"],
        guidance=[3.0],
        num_steps=2,
        limit=2,
        out=tmp_path / "comparison",
    )
    report = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert report["labels"] == ["base", "full", "lora", "final"]
    assert report["identical_noise"]
    values = {entry["label"]: entry["mean_after"] for entry in report["comparisons"]}
    assert values["lora"] == values["final"]  # the run and its exported file are the same model


@pytest.mark.parametrize("what", ["config alone", "unfinished run", "not a run"])
def test_grid_says_what_it_cannot_compare(config_file, tmp_path, what):
    arguments = {"vs": [], "prompts": None, "seeds": 1, "rewards": [], "guidance": [], "num_steps": 1, "limit": 1}
    path = config_file()
    target, message = {
        "config alone": (path, "nothing to compare"),
        "unfinished run": (tmp_path, "no final/ yet"),
        "not a run": (tmp_path / "empty", "not a run folder"),
    }[what]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        compare(str(target), out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
