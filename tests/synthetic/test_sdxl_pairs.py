"""The shipped pairs of the tiny SDXL: what the card says, and what makes them preferences."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from mmalign.synthetic.scenes import captions
from mmalign.synthetic.scorer import score

FOLDER = Path(str(files("mmalign.assets"))) / "sdxl-pairs"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return parquet.read_table(FOLDER / "train.parquet").to_pylist()


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((FOLDER / "card.json").read_text())


def image(value: dict) -> Image.Image:
    return Image.open(io.BytesIO(value["bytes"])).convert("RGB")


def test_card_counts_what_is_there(rows: list[dict], card: dict) -> None:
    assert card["num_pairs"] == len(rows) == len({row["id"] for row in rows})
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2_000_000


def test_train_captions_only_and_one_codec_on_both_sides(rows: list[dict]) -> None:
    assert {row["prompt"] for row in rows} <= set(captions("attributes", "train"))
    for row in rows[:50]:
        assert {Image.open(io.BytesIO(row[side]["bytes"])).format for side in ("chosen", "rejected")} == {"WEBP"}


def test_the_chosen_render_lies_where_the_own_sample_has_its_object(rows: list[dict]) -> None:
    """Nearer than a chosen render of another row of the same caption: an independent one would win every second time."""
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    nearer = []
    for same in by_prompt.values():
        chosen, rejected = (
            np.stack([image(row[side]) for row in same]).astype(np.float32) for side in ("chosen", "rejected")
        )
        other = np.roll(chosen, 1, axis=0)
        nearer.append(((chosen - rejected) ** 2).mean(axis=(1, 2, 3)) < ((other - rejected) ** 2).mean(axis=(1, 2, 3)))
    assert np.concatenate(nearer).mean() > 0.95


def test_the_exact_scorer_agrees_with_every_preference(rows: list[dict]) -> None:
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (score([image(row[side]) for row in rows], prompts) for side in ("chosen", "rejected"))
    assert chosen.all_right.all()
    assert (chosen.graded > rejected.graded).all()
