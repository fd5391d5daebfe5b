"""What a shipped YAML says above its first key: command, cost and evidence, held against what is there."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from mmalign.config import load_config
from mmalign.data.load import load_rows
from mmalign.data.readers import detect_format
from mmalign.types import ImageRef

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted(str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "presets")
REAL = [path for path in RECIPES if "/synthetic/" not in path]
SYNTHETIC = [path for path in RECIPES if "/synthetic/" in path]
PRESETS = sorted(str(p.relative_to(ROOT)) for p in (CONFIGS / "presets").glob("*.yaml"))
EVIDENCE = {"E0", "E1", "E2", "E3"}


def header(path: str) -> list[str]:
    """The comment lines that open a file, without `# `."""
    lines = []
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


@pytest.mark.parametrize("path", RECIPES)
def test_header_says_command_cost_metric_and_evidence(path: str):
    lines = header(path)
    assert lines, "no header comment"
    assert re.match(rf"(accelerate launch -m )?mmalign train {re.escape(path)}(\s|$)", lines[0]), lines[0]
    text = "\n".join(lines).lower()
    for key in ("hardware:", "memory:", "time:", "metric:"):
        assert key in text, f"the header does not state {key}"
    assert not re.search(r"\b(MEMORY|TIME|TODO)\b", "\n".join(lines)), "a placeholder was left in the header"
    levels = [match[1] for line in lines if (match := re.match(r"evidence:\s*(\w+)", line))]
    assert len(levels) == 1
    assert levels[0] in EVIDENCE


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_its_source(preset: str):
    assert header(preset), "a preset pins published settings: its header says whose"


# --- the command reads a user's own data ------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path: Path) -> dict[str, list[Path]]:
    """One row in each of the forms of docs/your_own_pairs.md that fit, by what a config trains on."""
    folders = tmp_path / "pairs"
    for side, colour in (("w", "red"), ("l", "blue")):
        (folders / side).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(folders / side / "fox.png")
    (folders / "w" / "fox.txt").write_text("a red fox")
    images = tmp_path / "pairs.jsonl"
    images.write_text(
        json.dumps({"prompt": "a red fox", "chosen": "pairs/w/fox.png", "rejected": "pairs/l/fox.png"}) + "\n"
    )
    answers = tmp_path / "answers.jsonl"
    answer = {"prompt": "What is this?", "images": ["pairs/w/fox.png"], "chosen": "A red fox.", "rejected": "A dog."}
    answers.write_text(json.dumps(answer) + "\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n")
    return {"images": [folders, images], "answers": [answers], "prompts": [prompts]}


@pytest.mark.parametrize("path", REAL)
def test_command_of_the_header_reads_your_own_data(path: str, own_data: dict[str, list[Path]]):
    words = header(path)[0].split()
    overrides = words[words.index(path) + 1 :]
    (placeholder,) = {word for word in overrides if word.startswith("data.path=")}
    kind = "prompts" if "PROMPTS" in placeholder else "answers" if "/llava/" in path else "images"
    for data in own_data[kind]:
        given = [f"data.path={data}" if word == placeholder else word for word in overrides]
        (row,) = load_rows(load_config(ROOT / path, given).config.data, seed=0).rows
        assert row.rejected is None if kind == "prompts" else isinstance(row.chosen, ImageRef) == (kind == "images")


@pytest.mark.parametrize("path", [path for path in REAL if "grpo" not in path])
def test_published_pairs_are_the_default_and_recognised(path: str):
    data = load_config(ROOT / path).config.data
    assert detect_format(data.path) == ("rlhf_v" if "/llava/" in path else "pickapic")


# --- the evidence it refers to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SYNTHETIC)
def test_learning_results_are_claimed_where_they_are(path: str):
    matrix = runpy.run_path(str(ROOT / "tests/learning/matrix.py"), run_name="matrix")
    results = json.loads(matrix["RESULTS"].read_text())
    saved = {name for name, table in results.items() if len(table["seeds"]) == 3}
    measured = {f"configs/{recipe.config}" for name, recipe in matrix["RECIPES"].items() if name in saved}
    text = " ".join(header(path))
    assert ("tests/learning/results.json holds three seeds" in text) == (path in measured)
    absent = re.findall(r"not in the learning matrix, (\w+\.yaml) is\b", text)
    assert bool(absent) == (path not in measured)
    assert all(f"configs/synthetic/{twin}" in measured for twin in absent)


@pytest.mark.parametrize("path", REAL)
def test_twin_trains_the_same_objective_or_the_header_says_which(path: str):
    (twin,) = {
        f"configs/synthetic/{name}" for name in re.findall(r"configs/synthetic/(\w+\.yaml)", " ".join(header(path)))
    }
    here, there = ([loss["name"] for loss in losses_of(name)] for name in (path, twin))
    for name in set(there) - set(here):
        assert f"`{name}`" in " ".join(header(path)), f"{twin} trains {there}, this trains {here}"


def losses_of(path: str) -> list[dict[str, object]]:
    return load_config(ROOT / path).config.method.options().get("losses", [])
