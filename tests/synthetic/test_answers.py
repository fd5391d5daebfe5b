"""Exact scores of free text: closed forms, the traps of counting words, and pairs of answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmalign.synthetic.answer_pairs import answer_pairs
from mmalign.synthetic.answers import (
    UNNAMED,
    is_caption,
    mentions,
    score_caption,
    short_answer_is_right,
    short_answers,
    summary,
)
from mmalign.synthetic.questions import SHORT_ANSWERS, describe, evaluation_questions, sample_objects_scene, split_of
from mmalign.synthetic.scenes import SPLITS, ObjectSpec

TRUTH = "there is a red circle and a blue square ."


def objects(text: str) -> list[str]:
    return [f"{m.object.colour} {m.object.shape}" for m in mentions(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRUTH, ["red circle", "blue square"]),
        ("There is a RED Circle, and a blue square!", ["red circle", "blue square"]),
        ("a large, red circle left of an orange cross on a white background", ["red circle", "orange cross"]),
        ("two red circles and three crosses", ["red circle"] * 2 + [f"{UNNAMED} cross"] * 3),
        ("a circle and a blue square", [f"{UNNAMED} circle", "blue square"]),
        ("a red circle and square", ["red circle", f"{UNNAMED} square"]),
        ("red , blue . square", [f"{UNNAMED} square"]),
        ("there is no red circle", []),
        ("there is not a red circle or a blue square .", ["blue square"]),
        ("no red circle or blue square", []),
        ("there is no red circle , but a blue square .", ["blue square"]),
        ("there is no red circle . a blue square is there", ["blue square"]),
        ("neither a red circle nor a blue square", []),
        ("the image shows a redcircle", []),
        ("", []),
        ("red red red", []),
    ],
)
def test_mentions(text: str, expected: list[str]) -> None:
    assert objects(text) == expected


def test_mentions_point_at_their_words() -> None:
    text = "There is a RED, small Circle and a square."
    assert [text[m.start : m.end] for m in mentions(text)] == ["RED, small Circle", "square"]


@pytest.mark.parametrize(
    ("text", "counts", "hallucination", "recall", "mentioned", "f1", "exact"),
    [
        (TRUTH, (2, 2), 0.0, 1.0, 1.0, 1.0, True),
        ("a red circle and a blue square", (2, 2), 0.0, 1.0, 1.0, 1.0, True),
        ("a blue square and a red circle", (2, 2), 0.0, 1.0, 1.0, 1.0, False),
        ("there is a red circle .", (1, 1), 0.0, 0.5, 0.5, 2 / 3, False),
        ("there is a red circle and a red square .", (2, 1), 0.5, 0.5, 1.0, 0.5, False),
        ("there is a red square and a blue circle .", (2, 0), 1.0, 0.0, 1.0, 0.0, False),
        (f"{TRUTH} a red circle", (3, 2), 1 / 3, 1.0, 1.5, 0.8, False),
        ("a circle and a square", (2, 0), 1.0, 0.0, 1.0, 0.0, False),
        ("nothing at all", (0, 0), 0.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_caption_scores_in_closed_form(text, counts, hallucination, recall, mentioned, f1, exact) -> None:
    found = score_caption(text, TRUTH)
    assert (found.num_mentioned, found.num_grounded) == counts
    assert found.num_absent == counts[0] - counts[1]
    assert found.hallucination == pytest.approx(hallucination)
    assert found.recall == recall
    assert found.mentioned == mentioned
    assert found.f1 == pytest.approx(f1)
    assert found.exact is exact


def test_true_captions_are_exact_and_their_objects_may_be_given_instead() -> None:
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for _ in range(50):
            scene = sample_objects_scene(split, rng)
            text = describe(scene.objects)
            for truth in (text, scene.objects):
                found = score_caption(text, truth)
                assert found.exact
                assert found.f1 == found.recall == 1.0


def test_repeating_an_object_grounds_it_once() -> None:
    found = score_caption("a red circle and a red circle and a red circle", TRUTH)
    assert found.grounded == (True, False, False)
    # ... unless the scene has as many.
    assert score_caption("two red circles", [ObjectSpec("red", "circle")] * 2).num_grounded == 2


def test_summary_is_over_objects_not_captions() -> None:
    texts = [TRUTH, "there is a red circle and a green square .", "there is a red circle ."]
    found = summary([score_caption(text, TRUTH) for text in texts])
    assert found == pytest.approx(
        {"hallucination": 1 / 5, "hallucinating": 1 / 3, "recall": 4 / 6, "exact": 1 / 3, "mentioned": 5 / 6}
    )
    assert all(math.isnan(value) for value in summary([]).values())


@pytest.mark.parametrize("truth", ["", "a photo of a dog", "circle", "there is a circle ."])
def test_truth_without_objects_is_refused(truth: str) -> None:
    with pytest.raises(ValueError, match=r"is no caption of this world.*'there is a red circle \.'"):
        score_caption(TRUTH, truth)
    assert not is_caption(truth)


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("yes", "yes", True),
        ("Yes.", "yes", True),
        ("no , the circle is blue", "no", True),
        ("yes and no", "yes", False),
        ("maybe", "yes", False),
        ("", "no", False),
        ("it is red .", "red", True),
        ("red or blue", "red", False),
        ("the redder one", "red", False),
        ("circles", "circle", True),
        ("a red cross", "cross", True),
        ("a red cross", "circle", False),
        ("3", "three", True),
        ("three objects", "three", True),
        ("four", "three", False),
        ("two or three", "three", False),
        ("two , yes two", "two", True),
    ],
)
def test_short_answers(text: str, truth: str, right: bool) -> None:
    assert short_answer_is_right(text, truth) is right


def test_short_answers_point_at_their_words() -> None:
    text = "Blue, not 2 red"
    assert [(answer, text[a:b]) for answer, a, b in short_answers(text, "red")] == [("blue", "Blue"), ("red", "red")]
    assert [answer for answer, _, _ in short_answers(text, "one")] == ["two"]


def test_every_true_short_answer_is_right_and_every_other_of_its_kind_wrong() -> None:
    for kind, allowed in SHORT_ANSWERS.items():
        for question in evaluation_questions("dev", 30, 0, kind):
            assert [short_answer_is_right(word, question.truth) for word in allowed].count(True) == 1
            assert short_answer_is_right(question.truth, question.truth)
            assert not is_caption(question.truth)


def test_truth_that_is_no_short_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'dog' is no short answer of this world; allowed: yes, no, red"):
        short_answer_is_right("dog", "dog")


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_rejected_caption_has_one_false_object_and_the_same_length() -> None:
    for pair in answer_pairs("swapped_attribute", 200, seed=7):
        assert score_caption(pair.chosen, pair.truth).exact
        found = score_caption(pair.rejected, pair.truth)
        assert found.num_absent == 1
        assert found.mentioned == 1.0
        assert len(pair.rejected.split()) == len(pair.chosen.split())
        attribute, index = pair.wrong
        assert found.grounded.index(False) == index
        true, false = (mentions(text)[index].object for text in (pair.chosen, pair.rejected))
        assert getattr(true, attribute) != getattr(false, attribute)
        assert (true.colour == false.colour) != (true.shape == false.shape)
        assert pair.prompt == "<image>\ndescribe the image ."
        assert pair.image_HWC.shape == (48, 48, 3)
        assert pair.image_HWC.dtype == np.uint8


def test_a_pair_depends_on_seed_split_and_index_alone() -> None:
    few = answer_pairs("swapped_attribute", 3, seed=1, split="dev")
    many = answer_pairs("swapped_attribute", 60, seed=1, split="dev")
    for a, b in zip(few, many, strict=False):
        assert (a.id, a.chosen, a.rejected, a.wrong) == (b.id, b.chosen, b.rejected, b.wrong)
        np.testing.assert_array_equal(a.image_HWC, b.image_HWC)
    assert len({p.id for p in many}) == 60
    assert [p.chosen for p in answer_pairs("swapped_attribute", 3, seed=2, split="dev")] != [p.chosen for p in few]
    for pair in many:
        assert split_of(m.object for m in mentions(pair.truth)) in ("dev", None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("own_samples", 3, 0), "answer pair kind 'own_samples' is unknown; allowed: swapped_attribute"),
        (("swapped_attribute", 0, 0), "num_pairs 0 is out of range"),
        (("swapped_attribute", 3, -1), "seed -1 is out of range"),
        (("swapped_attribute", 3, 0, "test"), "split 'test' is unknown"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        answer_pairs(*arguments)
