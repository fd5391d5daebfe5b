"""The shipped pairs of the tiny SDXL: what the card says, and what makes them preferences."""

from __future__ import annotations

import io
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

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
    assert card["pairs_by_kind"] == Counter(row["kind"] for row in rows)
    scales = Counter(f"{row['guidance_scale']:g}" for row in rows if row["kind"] == "own_sample")
    assert card["own_by_guidance_scale"] == scales
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_train_captions_only_and_one_codec_on_both_sides(rows: list[dict]) -> None:
    assert {row["prompt"] for row in rows} <= set(captions("attributes", "train"))
    for row in rows[:50]:
        assert {Image.open(io.BytesIO(row[side]["bytes"])).format for side in ("chosen", "rejected")} == {"WEBP"}


def test_the_exact_scorer_agrees_with_every_preference(rows: list[dict]) -> None:
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (score([image(row[side]) for row in rows], prompts) for side in ("chosen", "rejected"))
    assert chosen.all_right.all()
    assert (chosen.graded > rejected.graded).all()
