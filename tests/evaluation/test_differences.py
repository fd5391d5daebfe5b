"""Words that differ, in characters of Python and of JavaScript."""

from __future__ import annotations

import time

import pytest

from mmalign.evaluation.differences import num_words, to_utf16, word_differences, word_spans


def cut(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("a red circle .", "a blue circle .", ["red"], ["blue"]),
        ("a red circle", "a red circle", [], []),
        ("", "a circle", [], ["a circle"]),
        ("a circle", "", ["a circle"], []),
        # Neighbours make one span with the space between them; white space alone is no difference.
        ("one red square here", "one small blue cross here", ["red square"], ["small blue cross"]),
        ("a  b\n\nc", "a b c", [], []),
        ("Red.", "red!", ["Red."], ["red!"]),
        ("it isn't", "it is", ["isn't"], ["is"]),
        # No spaces between words: letter by letter.
        ("画像に赤い円", "画像に青い円", ["赤"], ["青"]),
    ],
)
def test_words_that_differ(before: str, after: str, gone: list[str], new: list[str]) -> None:
    found = word_differences(before, after)
    assert (cut(before, found[0]), cut(after, found[1])) == (gone, new)


def test_without_the_differences_both_sides_are_equal() -> None:
    before, after = "a red circle and a blue square , two crosses", "a circle and one blue square ; crosses here"
    gone, new = word_differences(before, after)

    def left(text: str, spans: list[tuple[int, int]]) -> list[str]:
        return [text[a:b] for a, b in word_spans(text) if not any(low <= a and b <= high for low, high in spans)]

    assert left(before, gone) == left(after, new) == ["a", "circle", "and", "blue", "square", "crosses"]


def test_endless_repetition_is_compared_in_no_time() -> None:
    before, after = "start " + "red " * 5000 + "end", "begin " + "red " * 4000 + "blue end"
    started = time.perf_counter()
    gone, new = word_differences(before, after)
    assert time.perf_counter() - started < 2
    assert (gone[0][0], new[0][0]) == (0, 0)
    assert before[gone[-1][1] :] == after[new[-1][1] :] == " end"


def test_javascript_counts_an_emoji_twice() -> None:
    text = "a 🙂 b 🙃🙃 c"
    spans = [(2, 3), (4, 5), (9, 10)]
    units = text.encode("utf-16-le")
    for (start, end), (low, high) in zip(spans, to_utf16(text, spans), strict=True):
        assert units[2 * low : 2 * high].decode("utf-16-le") == text[start:end]
    assert to_utf16("plain ü", [(0, 7)]) == [(0, 7)]


def test_punctuation_is_no_word() -> None:
    assert num_words("there is a circle , and a well-known square .") == 8
    assert num_words(" … ! ") == num_words("") == 0
