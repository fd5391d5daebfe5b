"""The exact judge of answers as a reward."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmalign.reward import load_reward

TRUTH = "there is a red circle and a blue square ."
CAPTION_PARTS = ("grounded", "recall", "mentioned")


@pytest.fixture(scope="module")
def scorer():
    return load_reward("synthetic_answers")


def scored(scorer, *pairs: tuple[str, str], **options):
    """Score (response, truth) pairs."""
    images = [[Image.new("RGB", (48, 48))]] * len(pairs)
    columns = [{"responses": response, "truth": truth} for response, truth in pairs]
    return scorer.score(images, [""] * len(pairs), columns, **options)


def test_captions_in_closed_form(scorer):
    output = scored(
        scorer,
        (TRUTH, TRUTH),
        ("there is a red circle .", TRUTH),
        ("there is a red circle and a red square .", TRUTH),
        ("a red circle and a red circle and a green cross", TRUTH),
        ("", TRUTH),
    )
    assert output.scores.tolist() == pytest.approx([1.0, 2 / 3, 0.5, 0.4, 0.0])
    assert output.sub_scores["grounded"].tolist() == pytest.approx([1.0, 1.0, 0.5, 1 / 3, 1.0])
    assert output.sub_scores["recall"].tolist() == [1.0, 0.5, 0.5, 0.5, 0.0]
    assert output.sub_scores["exact"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert output.sub_scores["mentioned"].tolist() == [1.0, 0.5, 1.0, 1.5, 0.0]


def test_short_answers_are_right_or_wrong_and_have_no_caption_parts(scorer):
    output = scored(scorer, ("Yes .", "yes"), ("no", "yes"), ("3", "three"), ("red or blue", "red"), (TRUTH, TRUTH))
    assert output.scores.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert output.sub_scores["exact"].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    for name in CAPTION_PARTS:
        assert torch.isnan(output.sub_scores[name]).tolist() == [True] * 4 + [False]


def test_marks_point_at_what_is_hallucinated_and_what_is_right(scorer):
    caption, short = "There is a Red circle and two green crosses.", "red, no: blue"
    output = scored(scorer, (caption, TRUTH), (short, "blue"))
    marked = [
        [(text[a:b], kind) for a, b, kind in marks] for text, marks in zip((caption, short), output.marks, strict=True)
    ]
    assert marked[0] == [("Red circle", "right"), ("green crosses", "hallucinated")]
    assert marked[1] == [("red", "wrong"), ("blue", "right")]


def test_row_without_a_usable_truth_costs_no_other_its_score(scorer):
    output = scored(scorer, (TRUTH, TRUTH), (TRUTH, "a photo of a dog"), ("yes", None), ("yes", "yes"))
    assert torch.isnan(output.scores).tolist() == [False, True, True, False]
    assert "no short answer of this world" in output.errors[1]
    assert "the column `truth` holds None" in output.errors[2]


def test_declarations(scorer):
    assert scorer.unit == "answer"
    assert scorer.range == (0.0, 1.0)
    assert set(scorer.required_columns) == {"responses", "truth"}
    assert scorer.needs_prompt is False


def test_missing_truth_column_is_named(scorer):
    with pytest.raises(ValueError, match="'truth'"):
        scorer.score([[Image.new("RGB", (48, 48))]], ["x"], [{"responses": TRUTH}])


def test_text_only_and_several_images_are_scored_alike(scorer):
    image = Image.new("RGB", (48, 48))
    columns = [{"responses": "red", "truth": "red"}] * 2
    assert scorer.score([[], [image, image]], ["", ""], columns).scores.tolist() == [1.0, 1.0]
