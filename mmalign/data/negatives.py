"""Image negatives: the picture that a right answer must not fit (mDPO's m_l), and the black picture of the blind control.

Each is a pure function of (seed, row id, variant, place in the row): policy and reference, chosen and rejected, one
process and two see the same negative, so it can be encoded once. (The released mDPO code crops inside `forward`; there
policy and reference are compared on different crops.)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmalign import randomness
from mmalign.types import ImageRef

if TYPE_CHECKING:
    import torch

    from mmalign.config import NegativeConfig

ASPECT_RATIOS = (3 / 4, 4 / 3)
NUM_ATTEMPTS = 10


def make_negative(
    image: Image.Image,
    config: NegativeConfig,
    *,
    seed: int,
    row_id: str,
    variant: int = 0,
    place: int = 0,
    others: Iterator[Image.Image] | Sequence[Image.Image] = (),
) -> Image.Image:
    """The negative of one image, an RGB image of the same size (`other`: of that image's own size).

    Args:
        config: `crop` enlarges a part of `config.area` of the image, `black` and `noise` leave nothing of it.
        seed, row_id, variant, place: identity of the randomness; `place` is the image's position in its row.
        others: for `other`: images of other rows, best first, e.g. from `Others`; the first is taken.

    Source: mDPO (arXiv 2406.11839) §3.2; area from the released code, RandomResizedCrop(scale=(0.01, 0.2)).
    """
    if config.kind == "black":
        return black(image)
    if config.kind == "noise":
        content = randomness.generator(seed, "negative_noise", identity(row_id, place), variant)
        return _noise(image, content)
    if config.kind == "other":
        for other in others:
            return other
        raise ValueError(
            f"row {row_id!r}: no other row shows a different image, so data.image_negative.kind: other has nothing to "
            f"take; use kind: crop"
        )
    generator = randomness.generator(seed, "negative_crop", identity(row_id, place), variant)
    top, left, height, width = crop_box(image.height, image.width, config.area, generator)
    # Cropped before it is enlarged: resampling with `box=` would blend in pixels from outside.
    part = image.crop((left, top, left + width, top + height))
    return part.resize(image.size, Image.Resampling.BICUBIC)


def crop_box(
    height: int, width: int, area: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part, by torchvision's `RandomResizedCrop.get_params`, draw for draw.

    Area share uniform in `area`, aspect ratio log-uniform in [3/4, 4/3]; after ten parts that do not fit, the largest
    central part with an allowed aspect ratio.
    """
    import torch

    def uniform(low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high, generator=generator).item()

    low, high = torch.log(torch.tensor(ASPECT_RATIOS)).tolist()
    for _ in range(NUM_ATTEMPTS):
        target = height * width * uniform(*area)
        ratio = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        part_w, part_h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < part_w <= width and 0 < part_h <= height:
            top = int(torch.randint(0, height - part_h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - part_w + 1, (1,), generator=generator))
            return top, left, part_h, part_w
    part_w = min(width, round(height * ASPECT_RATIOS[1]))
    part_h = min(height, round(width / ASPECT_RATIOS[0]))
    return (height - part_h) // 2, (width - part_w) // 2, part_h, part_w


def black(image: Image.Image) -> Image.Image:
    """Nothing to see, at the same size."""
    return Image.new("RGB", image.size)


def identity(row_id: str, place: int) -> str:
    return row_id if place == 0 else f"{row_id}\x1f{place}"


def _noise(image: Image.Image, generator: torch.Generator) -> Image.Image:
    import torch

    shape = (image.height, image.width, 3)
    pixels_HWC = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Image.fromarray(np.asarray(pixels_HWC))


class Others:
    """The different images of a data set on a ring, to pick another row's image from.

    The ring is ordered by content alone: the order of rows does not matter, and a row more or less changes few picks.

    Args:
        refs: images of all rows.
        digest: content digest of an image.
        seed: of the run.
    """

    def __init__(self, refs: Sequence[ImageRef], digest: Callable[[ImageRef], str], seed: int) -> None:
        by_digest = {digest(ref): ref for ref in refs}
        self.seed = seed
        self._ring = sorted((randomness.key(seed, "negative_ring", found), found) for found in by_digest)
        self._refs = by_digest

    def candidates(self, row_id: str, variant: int, place: int, avoid: Set[str]) -> Iterator[tuple[str, ImageRef]]:
        """(digest, image) of images that are none of `avoid`, the pick first; later ones serve if it cannot be read."""
        start = randomness.key(self.seed, "negative_other", identity(row_id, place), variant)
        first = bisect_left(self._ring, (start, ""))
        for step in range(len(self._ring)):
            _, digest = self._ring[(first + step) % len(self._ring)]
            if digest not in avoid:
                yield digest, self._refs[digest]
