"""Exact scores of free-text answers about the tiny world: which objects a caption mentions, and which are not there.

A mention is a shape word with the colour word before it in the same phrase ("a large red circle"), as many times as
the number word before it says ("two red circles"). A shape without a colour is a mention of something that is not
there, or vague captions would win. "no red circle" mentions nothing. Objects are counted: a second "red circle" about
a scene with one is absent.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .questions import SHORT_ANSWERS
from .scenes import COLOURS, COUNT_WORDS, SHAPES, ObjectSpec, SceneObject

UNNAMED = "unnamed"  # the colour of a mentioned shape that was given none
_NUMBERS = {"one": 1, **COUNT_WORDS, "five": 5, "six": 6}
_DIGITS = {str(number): word for word, number in _NUMBERS.items()}
_SHAPES = {form: shape for shape in SHAPES for form in (shape, shape + ("es" if shape.endswith("s") else "s"))}
_NEGATIONS = ("no", "not", "without", "never", "neither", "nor")
_WORD = re.compile(r"[a-z]+|\d+|[.,;?!]")
# After one of these a colour, number or negation no longer belongs to the next shape; commas do not end a list of
# adjectives ("a large, red circle"), so they are no breaks.
_BREAKS = ("and", "or", "but", ".", ";", "?", "!")


@dataclass(frozen=True, slots=True)
class Mention:
    """One mentioned object and the characters [start, end) of the text that mention it."""

    object: ObjectSpec
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """One caption against the objects of its scene.

    `grounded` says for each mention whether it is in the scene; each object of the scene grounds one mention. `exact`:
    the caption lists the scene's objects, all of them, in the order of the true caption.
    """

    num_true: int
    mentions: tuple[Mention, ...]
    grounded: tuple[bool, ...]
    exact: bool

    @property
    def num_mentioned(self) -> int:
        return len(self.mentions)

    @property
    def num_grounded(self) -> int:
        return sum(self.grounded)

    @property
    def num_absent(self) -> int:
        return self.num_mentioned - self.num_grounded

    @property
    def hallucination(self) -> float:
        """Share of the mentioned objects that are absent; 0 for a caption that mentions none."""
        return self.num_absent / self.num_mentioned if self.mentions else 0.0

    @property
    def recall(self) -> float:
        """Share of the scene's objects that are mentioned."""
        return self.num_grounded / self.num_true

    @property
    def mentioned(self) -> float:
        """Number of mentioned objects relative to the truth: 1 is the right length, whatever they are."""
        return self.num_mentioned / self.num_true

    @property
    def f1(self) -> float:
        """2 · grounded / (mentioned + true)."""
        return 2.0 * self.num_grounded / (self.num_mentioned + self.num_true)


def mentions(text: str) -> tuple[Mention, ...]:
    """The objects that a text mentions, in its order, repeated as often as it says."""
    found: list[Mention] = []
    colour, number, start, negated, denied = UNNAMED, 1, -1, False, False
    for match in _WORD.finditer(text.lower()):
        word = match.group()
        if word in _BREAKS:
            colour, number, start = UNNAMED, 1, -1
            negated = negated and word in ("and", "or")  # "no red circle or blue square" denies both
        elif word in _NEGATIONS:
            negated, denied = True, False
        elif word in ("a", "an", "the") and denied:
            negated = False  # "no red circle , a blue square": the denial ended with what it denied
        elif word in COLOURS:
            colour, start = word, match.start()
        elif word in _NUMBERS:
            number = _NUMBERS[word]
        elif word in _SHAPES:
            if not negated:
                begin = start if start >= 0 else match.start()
                found += [Mention(ObjectSpec(colour, _SHAPES[word]), begin, match.end())] * number
            colour, number, start, denied = UNNAMED, 1, -1, negated
    return tuple(found)


def score_caption(text: str, truth: str | Sequence[ObjectSpec | SceneObject]) -> CaptionScore:
    """Score a caption against the true caption, or against the scene's objects in reading order.

    Raises ValueError when the truth is no caption: then there is nothing to recall.
    """
    objects = [m.object for m in mentions(truth)] if isinstance(truth, str) else truth
    wanted = [ObjectSpec(o.colour, o.shape) for o in objects]
    if not wanted or any(o.colour == UNNAMED for o in wanted):
        raise ValueError(
            f"truth {truth!r} is no caption of this world: expected objects with colour ({', '.join(COLOURS)}) and "
            f"shape ({', '.join(SHAPES)}), e.g. 'there is a red circle .'"
        )
    given = mentions(text)
    left, grounded = Counter(wanted), []
    for mention in given:
        grounded.append(left[mention.object] > 0)
        left[mention.object] -= 1
    return CaptionScore(len(wanted), given, tuple(grounded), exact=[m.object for m in given] == wanted)


def is_caption(truth: str) -> bool:
    """Whether a true answer is a caption (mentions objects with colour and shape) rather than a short answer."""
    return any(mention.object.colour != UNNAMED for mention in mentions(truth))


def short_answers(text: str, truth: str) -> tuple[tuple[str, int, int], ...]:
    """The answers that a text gives to a question whose true answer is `truth`: (answer, start, end) in characters.

    Only words that could answer the same question count: yes or no, a colour, a shape, or a number (word or digit).

    Raises ValueError when the truth is not a short answer of this world.
    """
    allowed = next((words for words in SHORT_ANSWERS.values() if truth in words), None)
    if allowed is None:
        known = ", ".join(word for words in SHORT_ANSWERS.values() for word in words)
        raise ValueError(f"truth {truth!r} is no short answer of this world; allowed: {known}, or a caption")
    same = dict(zip(allowed, allowed, strict=True))
    if allowed == SHORT_ANSWERS["shape"]:
        same = _SHAPES
    elif allowed == SHORT_ANSWERS["count"]:
        same = {**{word: word for word in _NUMBERS}, **_DIGITS}
    found = [(same.get(m.group()), m.start(), m.end()) for m in _WORD.finditer(text.lower())]
    return tuple((answer, start, end) for answer, start, end in found if answer is not None)


def short_answer_is_right(text: str, truth: str) -> bool:
    """Whether the text gives the true short answer, and no other answer to its question.

    "no , the circle is blue" is a right "no"; "red or blue" is a wrong "red". Raises as `short_answers`.
    """
    return {answer for answer, _, _ in short_answers(text, truth)} == {truth}


def summary(scores: Sequence[CaptionScore]) -> dict[str, float]:
    """Corpus rates, NaN without captions or mentions.

    hallucination: absent / mentioned over all captions (CHAIR-i). hallucinating: share of captions with an absent
    object (CHAIR-s). recall, mentioned: over all true objects. exact: share of captions.
    """
    total = len(scores)
    true, given = sum(s.num_true for s in scores), sum(s.num_mentioned for s in scores)
    return {
        "hallucination": sum(s.num_absent for s in scores) / given if given else math.nan,
        "hallucinating": sum(s.num_absent > 0 for s in scores) / total if total else math.nan,
        "recall": sum(s.num_grounded for s in scores) / true if true else math.nan,
        "exact": sum(s.exact for s in scores) / total if total else math.nan,
        "mentioned": given / true if true else math.nan,
    }
