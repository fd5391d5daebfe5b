"""Which words differ between two answers, as character spans, and spans as a browser counts characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

Span = tuple[int, int]

MAX_WORDS = 1000

# Scripts without spaces between words are compared letter by letter: Thai, kana, Chinese, Hangul.
_WORD = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_"
)


def word_spans(text: str) -> list[Span]:
    """Words and single marks of punctuation, in order."""
    return [match.span() for match in _WORD.finditer(text)]


def num_words(text: str) -> int:
    """Words without punctuation."""
    return sum(text[start].isalnum() for start, _ in word_spans(text))


def word_differences(before: str, after: str) -> tuple[list[Span], list[Span]]:
    """Spans of `before` that are gone or replaced in `after`, and spans of `after` that are new.

    Neighbouring words make one span with the white space between them. Case counts, white space does not. Between texts
    of more than `MAX_WORDS` differing words, frequent words count as changed with their surroundings.
    """
    spans_before, spans_after = word_spans(before), word_spans(after)
    words_before = [before[start:end] for start, end in spans_before]
    words_after = [after[start:end] for start, end in spans_after]
    shorter = min(len(words_before), len(words_after))
    head = next((n for n in range(shorter) if words_before[n] != words_after[n]), shorter)
    rest = shorter - head
    tail = next((n for n in range(rest) if words_before[-1 - n] != words_after[-1 - n]), rest)
    middle_before = words_before[head : len(words_before) - tail]
    middle_after = words_after[head : len(words_after) - tail]
    # The search is quadratic in how often a word occurs, and a model that loops repeats one a thousand times.
    too_long = min(len(middle_before), len(middle_after)) > MAX_WORDS
    gone: list[Span] = []
    new: list[Span] = []
    for tag, i, j, k, m in SequenceMatcher(None, middle_before, middle_after, autojunk=too_long).get_opcodes():
        if tag == "equal":
            continue
        if j > i:
            gone.append((spans_before[head + i][0], spans_before[head + j - 1][1]))
        if m > k:
            new.append((spans_after[head + k][0], spans_after[head + m - 1][1]))
    return gone, new


def to_utf16(text: str, spans: Iterable[Span]) -> list[Span]:
    """Spans in UTF-16 code units, in which JavaScript counts: an emoji is one character here and two there."""
    found = list(spans)
    if text.isascii() or all(ord(letter) < 0x10000 for letter in text):
        return found
    unit = [0]
    for letter in text:
        unit.append(unit[-1] + (2 if ord(letter) >= 0x10000 else 1))
    return [(unit[start], unit[end]) for start, end in found]
