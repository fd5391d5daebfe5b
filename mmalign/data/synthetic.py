"""Pairs drawn in the tiny synthetic world, where it is known exactly which image fits its caption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from mmalign.registry import nearest
from mmalign.types import DataError, ImageRef, Row

PATH = "builtin:synthetic"


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

    if path != PATH:
        raise DataError(f"no bundled data set {path!r}{nearest(path, [PATH])}; the synthetic world is {PATH!r}")
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
