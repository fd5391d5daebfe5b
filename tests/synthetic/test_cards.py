"""Cards and build helpers: READMEs are what card.json says, the property of the aesthetic head, resumable training."""

from __future__ import annotations

import importlib.util
import json
import runpy
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.synthetic.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, captions, parse, sample_scenes

ASSETS = Path(str(files("mmalign.assets")))
BUILD = Path(__file__).resolve().parents[2] / "assets" / "build"
CARDS = runpy.run_path(str(BUILD / "cards.py"))


def test_every_folder_with_a_card_has_a_template():
    assert sorted(CARDS["CARDS"]) == sorted(path.parent.name for path in ASSETS.glob("*/card.json"))


@pytest.mark.parametrize("name", CARDS["CARDS"])
def test_readme_is_rendered_from_the_card(name: str):
    facts = json.loads((ASSETS / name / "card.json").read_text(encoding="utf-8"))
    assert (ASSETS / name / "README.md").read_text(encoding="utf-8") == CARDS["readme"](facts)
    others = [p for p in (ASSETS / name).rglob("*") if p.is_file() and p.name not in ("card.json", "README.md")]
    assert facts["bytes"] == sum(path.stat().st_size for path in others)


@pytest.mark.parametrize("name", CARDS["CARDS"])
def test_card_says_data_seed_size_and_command(name: str):
    text = (ASSETS / name / "README.md").read_text(encoding="utf-8")
    for said in ("| data | ", "seed", "bytes", "| command | `python assets/build/"):
        assert said in text
    assert name.endswith("-pairs") or "| steps" in text


def test_height_of_the_object_has_the_same_mean_for_every_word():
    """The aesthetic head's property, in its points of 0 to 10. With 150 scenes per caption the standard error of a word's mean
    is at most 0.03, and that of the difference of two 0.04."""
    texts = [text for split in ("train", "dev", "heldout") for text in captions("attributes", split)] * 150
    heights = np.array([10 * (1 - scene.objects[0].y) for scene in sample_scenes(texts, np.random.default_rng(0))])
    specs = {text: parse(text) for text in set(texts)}
    for kind, words in (("shape", SHAPES), ("size", SIZES), ("colour", COLOURS), ("background", BACKGROUNDS)):
        said = np.array(
            [specs[t].background if kind == "background" else getattr(specs[t].objects[0], kind) for t in texts]
        )
        means = [heights[said == word].mean() for word in words]
        assert max(means) - min(means) < 0.2, dict(zip(words, means, strict=True))


# --- `make assets` resumes --------------------------------------------------------------------------------------------


@pytest.fixture
def common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """assets/build/common.py with its checkpoints in `tmp_path`."""
    num_threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("assets_build_common", BUILD / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK_DIR", tmp_path / "work")
    yield module
    torch.set_num_threads(num_threads)


def train_a_line(common, name: str, *, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    """Eight steps of a linear layer on batches that are a function of the step, or the first of them."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    ema = common.Ema(module, 0.9)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-1)
    modules = {"module": module, "ema": ema}
    # Saved after every step: a kill between two saves goes back to the earlier one.
    steps = common.training_steps(name, 8, modules, optimizer, 1e-1, str, save_seconds=-1.0, checkpoint_steps=(4,))
    for step in steps:
        if step == stop_after:
            break
        x_BD = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        common.optimize(optimizer, module(x_BD).square().mean())
        ema.update(module, step)
    return {**module.state_dict(), **{f"ema.{key}": value for key, value in ema.state_dict().items()}}


def test_stopped_training_resumes_to_the_same_weights(common):
    whole = train_a_line(common, "whole")
    stopped = train_a_line(common, "stopped", stop_after=5)
    assert common.load_state("stopped")["step"] == 5
    resumed = train_a_line(common, "stopped")
    for key, value in whole.items():
        assert not torch.equal(stopped[key], value), "the stop came too late to prove anything"
        assert torch.equal(resumed[key], value), key
    for name in ("whole", "stopped"):
        assert common.load_state(f"{name}-4")["step"] == 4
        assert common.load_state(name)["step"] == 8
    assert torch.equal(train_a_line(common, "stopped")["weight"], whole["weight"])  # finished: nothing is done again
    assert not list(common.WORK_DIR.glob("*.tmp"))


def test_modules_of_a_checkpoint_that_is_not_there(common):
    with pytest.raises(ValueError, match="train first"):
        common.trained_modules("nothing")
