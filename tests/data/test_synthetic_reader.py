"""The bundled pairs as rows."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.data.load import load_rows
from mmalign.synthetic.answer_pairs import answer_pairs
from mmalign.synthetic.pairs import preference_pairs
from mmalign.types import DataError


def test_rows_are_the_drawn_pairs(data_config):
    options = {"num_pairs": 12, "seed": 3, "size_px": 32}
    row_set = load_rows(data_config("builtin:synthetic", options=options), seed=0)
    drawn = preference_pairs("wrong_attribute", 12, 3, size_px=32)
    assert [row.id for row in row_set.rows] == [pair.id for pair in drawn]
    for row, pair in zip(row_set.rows, drawn, strict=True):
        assert row.prompt == pair.prompt
        assert np.array_equal(np.asarray(row.chosen.open()), pair.chosen_HWC)
        assert np.array_equal(np.asarray(row.rejected.open()), pair.rejected_HWC)
        assert row.columns == {"wrong": list(pair.wrong)}
    again = load_rows(data_config("builtin:synthetic", options=options), seed=9)
    assert again.fingerprint == row_set.fingerprint


def test_options_reach_the_drawing(data_config):
    rows = load_rows(data_config("builtin:synthetic", options={"num_pairs": 2, "tier": "relations"}), seed=0).rows
    assert rows[0].chosen.open().size == (64, 64)
    assert "relations" in rows[0].id


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("builtin:synth", {}, r"no bundled data set 'builtin:synth' \(did you mean 'builtin:synthetic'\?\)"),
        ("builtin:sdxl-pair", {}, r"no bundled data set 'builtin:sdxl-pair' \(did you mean 'builtin:sdxl-pairs'\?\)"),
        ("builtin:synthetic", {"num_pairs": 0}, "num_pairs 0 is out of range"),
        ("builtin:synthetic", {"tier": "colours"}, "option 'tier'"),
        ("builtin:synthetic", {"pairs_kind": "x"}, "has no option 'pairs_kind'"),
    ],
)
def test_bad_options_are_named(path, options, says, data_config):
    with pytest.raises((DataError, ValueError), match=says):
        load_rows(data_config(path, options=options), seed=0)


def test_answer_rows_are_the_drawn_pairs(data_config):
    row_set = load_rows(
        data_config("builtin:synthetic_answers", options={"num_pairs": 7, "seed": 3, "split": "dev"}), seed=0
    )
    drawn = answer_pairs("swapped_attribute", 7, 3, "dev")
    for row, pair in zip(row_set.rows, drawn, strict=True):
        assert (row.id, row.prompt, row.chosen, row.rejected) == (pair.id, pair.prompt, pair.chosen, pair.rejected)
        assert row.columns == {"truth": pair.truth, "wrong": list(pair.wrong)}
        (image,) = row.images
        assert np.array_equal(np.asarray(image.open()), pair.image_HWC)


@pytest.mark.parametrize(
    ("format_", "path", "options", "says"),
    [
        ("auto", "builtin:synthetic_answers", {"num_pairs": 0}, "num_pairs 0 is out of range"),
        ("auto", "builtin:synthetic_answers", {"tier": "attributes"}, "has no option 'tier'"),
        ("synthetic_answers", "builtin:synthetic", {}, "it draws 'builtin:synthetic_answers'"),
    ],
)
def test_bad_answer_options_are_named(format_, path, options, says, data_config):
    config = data_config(path, options=options).model_copy(update={"format": format_})
    with pytest.raises((DataError, ValueError), match=says):
        load_rows(config, seed=0)
