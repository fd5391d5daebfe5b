"""Rewards that score answers: what they are shown, what they may return, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from PIL import Image

from mmalign.conformance import run_checks
from mmalign.reward import RewardError, RewardOutput, Scorer

IMAGES = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(3)]
TEXTS = ["a red circle", "", "blue 🙂"]
COLUMNS = [{"responses": text, "truth": "red"} for text in TEXTS]


def made(function: Any, name: str = "f") -> Scorer:
    return Scorer(function, name=name)


def test_an_answer_comes_with_the_list_of_its_images() -> None:
    seen: dict[str, Any] = {}

    def lengths(images: list[list[Image.Image]], prompts: list[str], responses: list[str], truth: list[str]) -> Any:
        seen.update(images=images, prompts=prompts, responses=responses, truth=truth)
        return [float(len(text)) for text in responses]

    scorer = made(lengths)
    assert scorer.unit == "answer"
    # One image alone, several, none.
    output = scorer.score([IMAGES[0], IMAGES[1:], []], ["p", "q", "r"], COLUMNS)
    assert seen["images"] == [[IMAGES[0]], IMAGES[1:], []]
    assert seen["prompts"] == ["p", "q", "r"]
    assert seen["responses"] == TEXTS
    assert seen["truth"] == ["red"] * 3
    assert output.scores.tolist() == [12.0, 0.0, 6.0]
    assert output.marks is None
    assert made(lambda images, prompts: [0.0]).unit == "image"
    # Taking every column is not asking for answers.
    assert made(lambda images, **columns: [0.0]).unit == "image"


def test_answers_are_missing_or_images_are_none() -> None:
    scorer = made(lambda images, responses: [0.0] * len(responses))
    with pytest.raises(RewardError, match=r"'f' scores answers \(it takes `responses`\), and there are none"):
        scorer.score(IMAGES, ["p"] * 3, [{"truth": "x"}] * 3)
    with pytest.raises(RewardError, match="scores answers"):
        scorer.score(IMAGES)
    with pytest.raises(ValueError, match="image 1 is str, expected an RGB PIL image"):
        scorer.score([[IMAGES[0]], ["image.png"], []], None, COLUMNS)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="image 0 is list, expected an RGB PIL image"):
        made(lambda images: [0.0]).score([[IMAGES[0]]])


def test_messages_speak_of_answers() -> None:
    with pytest.raises(RewardError, match="one per answer"):
        made(lambda images, responses: [[1.0]] * 3).score(IMAGES, None, COLUMNS)
    with pytest.raises(RewardError, match="2 scores for 3 answers"):
        made(lambda images, responses: [1.0, 2.0]).score(IMAGES, None, COLUMNS)
    with pytest.raises(RewardError, match="no valid score for any of 3 answers"):
        made(lambda images, responses: [None] * 3).score(IMAGES, None, COLUMNS)

    def broken(images: Any, responses: Any) -> Any:
        raise KeyError("x")

    with pytest.raises(RewardError, match="failed on a batch of 3 answers: KeyError"):
        made(broken).score(IMAGES, None, COLUMNS)


def test_marks_come_back_in_order_whatever_the_batches() -> None:
    def mark(images: Any, responses: list[str]) -> RewardOutput:
        marks = [[(6, 12, "right"), (2, 5, "hallucinated")] if text.startswith("a") else [] for text in responses]
        return RewardOutput([1.0] * len(responses), marks=marks)

    mark.batch_size = 2  # type: ignore[attr-defined]
    output = made(mark).score(IMAGES, None, COLUMNS)
    assert output.marks == [[(2, 5, "hallucinated"), (6, 12, "right")], [], []]

    # A row that is left out for want of a prompt has no marks.
    def needs(images: Any, prompts: Any, responses: list[str]) -> RewardOutput:
        return mark(images, responses)

    needs.needs_prompt = True  # type: ignore[attr-defined]
    output = made(needs).score(IMAGES, ["", "p", "p"], [{"responses": "a red circle"}] * 3)
    assert [len(marks) for marks in output.marks or ()] == [0, 2, 2]
    assert math.isnan(output.scores[0])


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ([[], []], "marks as 2 lists for 3 answers, expected one list each"),
        ("abc", "marks as str for 3 answers"),
        ([[(0, 13, "right")], [], []], r"mark \(0, 13, 'right'\) of answer 0 .* 0 <= start < end <= 12"),
        ([[], [(0, 1, "right")], []], "answer 1 .* <= 0, the length of the answer"),
        ([[(3, 3, "right")], [], []], "start < end"),
        ([[(0.0, 1.0, "right")], [], []], r"mark \(0\.0, 1\.0, 'right'\)"),
        ([[(0, 1)], [], []], r"mark \(0, 1\) of answer 0 is no \(start, end, kind\)"),
        ([[(0, 1, "bad")], [], []], "allowed kinds are hallucinated, wrong, right"),
    ],
)
def test_marks_that_are_none(marks: Any, message: str) -> None:
    scorer = made(lambda images, responses: RewardOutput([1.0] * 3, marks=marks))
    with pytest.raises(RewardError, match=message):
        scorer.score(IMAGES, None, COLUMNS)


def test_marks_are_for_answers() -> None:
    with pytest.raises(RewardError, match="returned marks, which are for answers, but takes no `responses`"):
        made(lambda images: RewardOutput([1.0] * 3, marks=[[], [], []])).score(IMAGES)


def failed(reward_file: Any, body: str) -> set[str]:
    return {check.name for check in run_checks(f"{reward_file(body)}:f") if check.status == "fail"}


def test_check_speaks_to_rewards_of_answers(reward_file: Any) -> None:
    assert not failed(reward_file, "def f(images, responses): return [float(len(text)) for text in responses]")
    empty = "def f(images, responses): return [len(text) / (len(text.split()[0])) for text in responses]"
    assert failed(reward_file, empty) == {"hard inputs"}
    no_image = (
        "def f(images, responses): return [float(shown[0].width + len(t)) for shown, t in zip(images, responses)]"
    )
    assert failed(reward_file, no_image) == {"hard inputs"}
    marks = "def f(images, responses): return RewardOutput([1.0] * len(images), marks=[[(0, 1, 'x')]] * len(images))"
    assert failed(reward_file, "from mmalign.reward import RewardOutput\n" + marks) == {"dtype"}
    assert all(check.status != "fail" for check in run_checks("synthetic_answers"))
