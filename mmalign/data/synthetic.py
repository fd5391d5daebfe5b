"""Pairs drawn in the tiny synthetic world, where it is known exactly which image, or which answer, is true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from mmalign.types import DataError, ImageRef, Row

PATH = "builtin:synthetic"
ANSWERS_PATH = "builtin:synthetic_answers"


def read_synthetic(
    path: str,
    *,
    pairs: Literal["wrong_attribute"] = "wrong_attribute",
    num_pairs: int = 960,
    tier: Literal["attributes", "relations"] = "attributes",
    split: Literal["train", "dev", "heldout"] = "train",
    seed: int = 0,
    size_px: int = 64,
) -> Iterator[Row]:
    """Drawn pairs: `chosen` fits the prompt, `rejected` gets one or two parts of it wrong (`columns["wrong"]`).

    Args:
        path: `builtin:synthetic`; nothing is read.
        pairs: how the rejected image is made.
        num_pairs: rows.
        tier: `attributes` (one object) or `relations` (counts and positions).
        split: which captions.
        seed: of the drawing; independent of the run's seed.
        size_px: side of the images.
    """
    from PIL import Image

    from mmalign.synthetic.pairs import preference_pairs

    _check_path(path, PATH)
    try:
        drawn = preference_pairs(pairs, num_pairs, seed, tier=tier, split=split, size_px=size_px)
    except ValueError as error:
        raise DataError(f"{path}, data.options: {error}") from error
    for index, pair in enumerate(drawn):
        source = f"{path}:{index}"
        columns: dict[str, Any] = {"wrong": list(pair.wrong)}
        yield Row(
            id=pair.id,
            prompt=pair.prompt,
            chosen=ImageRef.from_pil(Image.fromarray(pair.chosen_HWC), f"{source} chosen"),
            rejected=ImageRef.from_pil(Image.fromarray(pair.rejected_HWC), f"{source} rejected"),
            source=source,
            columns=columns,
        )


def read_synthetic_answers(
    path: str,
    *,
    pairs: Literal["swapped_attribute"] = "swapped_attribute",
    num_pairs: int = 960,
    split: Literal["train", "dev", "heldout"] = "train",
    seed: int = 0,
) -> Iterator[Row]:
    """Drawn questions about an image: `chosen` is the true answer (also `columns["truth"]`), `rejected` a false one.

    Args:
        path: `builtin:synthetic_answers`; nothing is read.
        pairs: how the rejected answer is made: one object of the caption has another colour or shape.
        num_pairs: rows.
        split: which sets of objects.
        seed: of the drawing; independent of the run's seed.
    """
    from PIL import Image

    from mmalign.synthetic.answer_pairs import answer_pairs

    _check_path(path, ANSWERS_PATH)
    try:
        drawn = answer_pairs(pairs, num_pairs, seed, split=split)
    except ValueError as error:
        raise DataError(f"{path}, data.options: {error}") from error
    for index, pair in enumerate(drawn):
        source = f"{path}:{index}"
        yield Row(
            id=pair.id,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            images=(ImageRef.from_pil(Image.fromarray(pair.image_HWC), f"{source} image"),),
            source=source,
            columns={"truth": pair.truth, "wrong": list(pair.wrong)},
        )


def _check_path(path: str, expected: str) -> None:
    if path != expected:
        raise DataError(
            f"data.path {path!r}: this reader reads no files, it draws {expected!r}; set data.format to read files"
        )
