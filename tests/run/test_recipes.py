"""Every synthetic recipe runs end to end, from its file to its report: what `evidence: E1` in its header means."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmalign

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs" / "synthetic").glob("*.yaml"))
SHORT = [
    "train.steps=2",
    "train.batch_size=4",
    "data.options.num_pairs=8",
    "evaluate.limit=1",
    "evaluate.seeds=1",
    "evaluate.num_steps=2",
    "evaluate.guidance_scale=[1.0, 3.0]",
    "run.tracker=none",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_end_to_end(recipe: str, tmp_path: Path):
    result = mmalign.train(recipe, [*SHORT, f"output_dir={tmp_path / 'run'}"])
    assert result.summary["status"] == "finished"
    assert {entry["guidance_scale"] for entry in result.report["comparisons"]} == {1.0, 3.0}
    for name in ("grid.png", "report.html", "final"):
        assert (result.folder / name).exists()
