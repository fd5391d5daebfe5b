"""Every synthetic recipe runs end to end, from its file to its report: what `evidence: E1` in its header means."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmalign
from mmalign.config import load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs" / "synthetic").glob("*.yaml"))
SHORT = ["evaluate.limit=1", "evaluate.seeds=1", "run.tracker=none"]
DRAWN = ["train.steps=2", "train.batch_size=4", "data.options.num_pairs=8"]
READ = ["train.steps=2", "train.batch_size=4", "data.limit=8"]
ROLLOUTS = [
    "train.steps=4",
    "train.batch_size=4",
    "method.num_steps=3",
    "method.group_size=4",
    "method.prompts_per_rollout=4",
]
IMAGES = ["evaluate.num_steps=2", "evaluate.guidance_scale=[1.0, 3.0]"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_end_to_end(recipe: str, tmp_path: Path):
    config = load_config(recipe).config
    answers = config.model.family == "llava"
    kind = ROLLOUTS if config.rewards else DRAWN if config.data.format == "synthetic" else READ
    overrides = [*SHORT, *kind, *([] if answers else IMAGES), f"output_dir={tmp_path / 'run'}"]
    result = mmalign.train(recipe, overrides)
    assert result.summary["status"] == "finished"
    if not answers:
        assert {entry["guidance_scale"] for entry in result.report["comparisons"]} == {1.0, 3.0}
    for name in ("grid.png", "report.html", "final"):
        assert (result.folder / name).exists()
