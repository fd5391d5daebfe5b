"""Rewards that fail, lie or do not answer: masked where they may be, named where they may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmalign
from mmalign.reward import RewardError
from mmalign.run.evidence import EvidenceError

REWARDS = '''
"""Rewards for the fault tests."""

from pathlib import Path

import numpy as np

SWITCH = Path(__file__).with_name("answer")


def _red(images):
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def sometimes(images, prompts):
    scores = _red(images)
    return [float("nan") if prompt == prompts[0] else score for prompt, score in zip(prompts, scores)]


def switched(images):
    return _red(images) if SWITCH.exists() else [None] * len(images)


def column(images):
    return np.asarray(_red(images))[:, None]


def short(images):
    return _red(images)[:-1]


def words(images):
    return ["good"] * len(images)


def crashes(images):
    raise KeyError("brightness")


def depends_on_batch(images):
    scores = _red(images)
    return [score - sum(scores) / len(scores) for score in scores]


class Alignment:
    needs_prompt = True

    def __call__(self, images, prompts):
        return _red(images)
'''


@pytest.fixture
def reward(tmp_path: Path) -> Callable[[str], str]:
    (tmp_path / "odd_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    return lambda name: f"{tmp_path / 'odd_rewards.py'}:{name}"


@pytest.fixture
def judged(tiny: Callable, reward: Callable, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A run of two steps that is evaluated on two prompts with the reward of this name."""

    def make(name: str, **sections: Any) -> dict[str, Any]:
        evaluate = {"prompts": str(tmp_path / "prompts.txt"), "seeds": 1, "num_steps": 2, "rewards": [reward(name)]}
        return tiny(evaluate=evaluate, **sections)

    return make


def test_nan_scores_are_masked_and_reported(judged: Callable, command: Callable, tmp_path: Path, capfd):
    result = mmalign.train(judged("sometimes"))
    says = "  warning: sometimes has no valid score for 2 of 4 images. First reason: no score (None or NaN)"
    assert says in capfd.readouterr().out.splitlines()
    code, out, _ = command("grid", result.folder, "--seeds", 1, "--out", tmp_path / "grid")
    assert code == 0
    assert says in out.splitlines()
    entry = result.report["rewards"]["sometimes"]
    assert (result.report["num_prompts"], entry["n_prompts"], entry["n_valid"]) == (2, 1, 1)
    assert "sometimes has no valid score for 2 of 4 images" in result.report["warnings"][0]
    assert "has no valid score for 2 of 4 images" in (result.folder / "report.html").read_text()
    assert json.loads((result.folder / "report.json").read_text(), parse_constant=pytest.fail)


def test_evaluation_without_one_score_keeps_the_weights_and_is_made_up_for(
    judged: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run, config = tmp_path / "run", judged("switched")
    with pytest.raises(ValueError, match=r"reward 'switched' gave no valid score for any of 4 images") as caught:
        mmalign.train(config)
    assert "\n" not in str(caught.value)
    assert not [name for name in ("report.json", "report.html", "grid.png", "summary.json") if (run / name).exists()]
    exported = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    written = (run / "checkpoints" / "step_2" / "state.json").stat().st_mtime_ns
    images = {path: path.stat().st_mtime_ns for path in run.rglob("samples/**/*.png")}
    assert len(images) == 4

    (tmp_path / "answer").touch()
    result = mmalign.train(config)
    assert result.summary["status"] == "finished"
    assert result.report["rewards"]["switched"]["n_valid"] == 2
    assert (run / "checkpoints" / "step_2" / "state.json").stat().st_mtime_ns == written
    assert {path: path.stat().st_mtime_ns for path in images} == images
    again = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], again[name]) for name in exported)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_longer_run_whose_evaluation_fails_keeps_no_report_of_the_weights_before(judged: Callable, tmp_path: Path):
    run, evidence = tmp_path / "run", ("report.json", "report.html", "grid.png", "scores.jsonl", "summary.json")
    (tmp_path / "answer").touch()
    mmalign.train(judged("switched"))
    before = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert [name for name in evidence if not (run / name).exists()] == []
    (tmp_path / "answer").unlink()
    with pytest.raises(ValueError, match="no valid score"):
        mmalign.train(judged("switched", train={"steps": 3}))
    after = load_file(run / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [name for name in evidence if (run / name).exists()] == []
    (tmp_path / "answer").touch()
    assert mmalign.train(judged("switched", train={"steps": 3})).summary["steps"] == 3
    assert [name for name in evidence if not (run / name).exists()] == []


def test_run_ended_by_its_stop_rule_does_not_train_on_when_only_the_evaluation_failed(judged: Callable, tmp_path: Path):
    config = judged("switched", train={"steps": 9, "stop": {"metric": "loss", "above": 0.1}})
    with pytest.raises(ValueError, match="no valid score"):
        mmalign.train(config)
    (tmp_path / "answer").touch()
    assert {**mmalign.train(config).summary, "seconds": 0}["status"] == "stopped"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("column", "returned an array of shape [4, 1]; expected 4 real numbers"),
        ("short", "returned 3 scores for 4 images"),
        ("words", "whose item 0 is str 'good'"),
        ("crashes", "failed on a batch of 4 images: KeyError: 'brightness'"),
    ],
)
def test_reward_that_breaks_the_contract_is_named(judged: Callable, tmp_path: Path, name: str, says: str):
    with pytest.raises(EvidenceError) as caught:
        mmalign.train(judged(name))
    assert type(caught.value.__cause__) is RewardError
    assert f"weights are safe in {tmp_path / 'run' / 'final'}" in str(caught.value)
    assert str(caught.value).startswith(f"reward {name!r}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()
    assert not (tmp_path / "run" / "report.json").exists()


def test_score_of_bare_images_with_a_reward_that_needs_prompts(
    reward: Callable, command: Callable, encoded: Callable, tmp_path: Path
):
    (tmp_path / "images").mkdir()
    for seed in range(2):
        (tmp_path / "images" / f"{seed}.png").write_bytes(encoded(seed))
    args = ("score", tmp_path / "images", "--reward", reward("Alignment"), "--out", tmp_path / "scores.jsonl")
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: reward 'Alignment' needs prompts, and")
    assert "put each prompt into a .txt file beside its image" in line
    assert not (tmp_path / "scores.jsonl").exists()

    (tmp_path / "images" / "0.txt").write_text("a red circle")
    assert command(*args)[0] == 1  # one of the two has a prompt now
    scores = [json.loads(line)["score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert scores[0] > 0
    assert scores[1] is None


def test_score_keeps_the_old_file_when_the_reward_fails(
    reward: Callable, command: Callable, encoded: Callable, tmp_path: Path
):
    (tmp_path / "image.png").write_bytes(encoded(0))
    (tmp_path / "scores.jsonl").write_text("precious\n")
    code, _, err = command(
        "score", tmp_path / "image.png", "--reward", reward("short"), "--out", tmp_path / "scores.jsonl"
    )
    assert code == 2
    assert err == f"error: {err[7:-1]}\n"
    assert "returned 0 scores for 1 images" in err
    assert (tmp_path / "scores.jsonl").read_text() == "precious\n"
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("name", "says"), [("column", "shape"), ("crashes", "call"), ("depends_on_batch", "batch of 1"), ("words", "dtype")]
)
def test_check_of_a_broken_reward_fails(reward: Callable, command: Callable, name: str, says: str):
    code, out, err = command("rewards", "check", reward(name))
    assert code == 1, err
    assert any(says in line and "fail" in line for line in out.splitlines()), out
    assert "failed" in out.splitlines()[-1]
