"""What a batch is made of: contexts, targets and image negatives, from the cache where there is one, else encoded.

`ImageFeatures` serves policies that draw images (prompt records, latents of both images), `TextFeatures` (in
text_features.py) those that answer in text (token ids and vision features). With and without a cache the same records
come out: they depend on the row, the visit and the seed alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmalign.data.cache import FeatureCache, feature_key
from mmalign.data.digests import DigestIndex
from mmalign.data.images import PreparedImage, prepare_image
from mmalign.randomness import uniform
from mmalign.types import DataError, ImageRef, Row, Side

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import DataConfig

    Record = dict[str, Tensor]

CENTRE = (0.5, 0.5)
SIDES: tuple[Side, Side] = ("chosen", "rejected")
OVERFLOW = "SDXL's own VAE overflows in fp16: set model.dtype to bf16 or fp32, or model.vae to a VAE made for fp16"
Kind = Literal["prompt", "image"]


@dataclass(frozen=True)
class Entry:
    """One cache entry that a row needs. `prepare` makes what the encoder takes; it may raise `DataError`."""

    key: str
    source: str
    prepare: Callable[[], Any]


class Features(Protocol):
    """Looks up or encodes. May be called from several threads; the policy is called from one at a time.

    `visits` holds how often each row was met before, within the cycle of a reference cache: what varies between visits (crop,
    flip, prompt dropout, variant of a negative) follows from it.
    """

    cache: FeatureCache | None
    sides: Sequence[Side]
    """The responses that the method reads; no image of another one is encoded."""

    def contexts(self, rows: Sequence[Row], visits: Sequence[int]) -> list[Any]:
        """What each row's response is conditioned on."""

    def targets(self, rows: Sequence[Row], side: Side, visits: Sequence[int]) -> list[Any]:
        """The encoded `chosen` or `rejected` of each row."""

    def negatives(self, rows: Sequence[Row], visits: Sequence[int]) -> list[Any]:
        """`contexts` with every image replaced by its negative. Raises `ValueError` where there are none."""

    def problem(self, row: Row) -> str | None:
        """Why this row cannot be used, found without decoding an image."""

    def prompt_entries(self, rows: Sequence[Row]) -> list[Entry]:
        """The cache entries of the rows' prompts, each different one once."""

    def image_entries(self, row: Row) -> list[Entry]:
        """The cache entries of the row's images."""

    def images_of(self, row: Row) -> list[ImageRef]:
        """The images that `image_entries` come from."""

    def encode(self, kind: Kind, inputs: Sequence[Any], sources: Sequence[str]) -> list[Record]:
        """Prepared prompts or images straight through the encoder. `sources` name them in errors."""


def make_features(
    policy: Any,
    config: DataConfig,
    cache: FeatureCache | None,
    *,
    seed: int,
    rows: Sequence[Row] = (),
    negatives: bool = False,
    sides: Sequence[Side] = SIDES,
) -> Features:
    """The features that fit the policy's modality.

    Args:
        cache: None encodes at every call and keeps nothing.
        seed: of the run; crops, flips, dropout and negatives depend on it.
        rows: all rows of the run; `data.image_negative.kind: other` takes its images from them.
        negatives: whether the method contrasts images, so that `image_entries` names the negatives too.
        sides: the responses that the method reads (`method.sides`).
    """
    if policy.modality == "text":
        from mmalign.data.text_features import TextFeatures

        return TextFeatures(policy, config, cache, seed=seed, rows=rows, with_negatives=negatives, sides=sides)
    return ImageFeatures(policy, config, cache, seed=seed, sides=sides)


class ImageFeatures:
    """Prompts and images for policies that draw images. Both images of a row share crop and flip.

    Args:
        policy: whose frozen encoders are used.
        config: the `data` section.
        cache: None encodes at every call and keeps nothing.
        seed: of the run; random crops depend on it.
        sides: the responses that the method reads.
    """

    def __init__(
        self,
        policy: Any,
        config: DataConfig,
        cache: FeatureCache | None,
        *,
        seed: int,
        sides: Sequence[Side] = SIDES,
    ) -> None:
        self.policy, self.config, self.cache, self.seed, self.sides = policy, config, cache, seed, sides
        self.resolution = config.resolution or policy.resolution
        self._digests = cache.digests if cache is not None else DigestIndex(None)
        self._encoding = threading.Lock()

    def contexts(self, rows: Sequence[Row], visits: Sequence[int]) -> list[Record]:
        return self.prompts([self._prompt(row, visit) for row, visit in zip(rows, visits, strict=True)])

    def targets(self, rows: Sequence[Row], side: Side, visits: Sequence[int]) -> list[Record]:
        crop_ids = [visit % self.config.num_crops if self.config.crop == "random" else 0 for visit in visits]
        flips = [self._flip(row, visit) for row, visit in zip(rows, visits, strict=True)]
        refs = [_image_response(row, side) for row in rows]
        return self.images(refs, [row.id for row in rows], crop_ids, flips)

    def negatives(self, rows: Sequence[Row], visits: Sequence[int]) -> list[Record]:
        raise ValueError(
            "image negatives belong to rows that show images and are answered in text; this model draws images from a "
            "prompt, so there is no image to replace. Use a method without image contrast"
        )

    def problem(self, row: Row) -> str | None:
        for side in (row.chosen, row.rejected):
            if isinstance(side, str):
                return (
                    f"the response is text ({side[:40]!r}), but the model draws images; give an image, or another model"
                )
        if row.images or row.history:
            return "the prompt shows images or earlier turns, but the model draws images from one text prompt alone"
        return None

    def prompt_entries(self, rows: Sequence[Row]) -> list[Entry]:
        texts = sorted({"", *(row.prompt for row in rows)})
        return [Entry(self.prompt_key(text), f"prompt {text[:80]!r}", partial(str, text)) for text in texts]

    def images_of(self, row: Row) -> list[ImageRef]:
        return [ref for side in self.sides if isinstance(ref := getattr(row, side), ImageRef)]

    def image_entries(self, row: Row) -> list[Entry]:
        return [self._entry(ref, row.id, *variant) for ref in self.images_of(row) for variant in self.variants()]

    def encode(self, kind: Kind, inputs: Sequence[Any], sources: Sequence[str]) -> list[Record]:
        return self.encode_prompts(inputs) if kind == "prompt" else self.encode_images(inputs, sources)

    def _entry(self, ref: ImageRef, row_id: str, crop_id: int, flip: bool) -> Entry:
        key = self.image_key(ref, row_id, crop_id, flip)
        return Entry(key, ref.source, lambda: self.prepare(ref, row_id, crop_id, flip))

    def _flip(self, row: Row, visit: int) -> bool:
        return self.config.flip and uniform(self.seed, "flip", row.id, visit) < 0.5

    def _prompt(self, row: Row, visit: int) -> str:
        dropped = uniform(self.seed, "prompt_dropout", row.id, visit) < self.config.prompt_dropout
        return "" if dropped else row.prompt

    def prompt(self, text: str) -> Record:
        """The text features of one prompt."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[Record]:
        """The text features of each prompt; what is missing is encoded in one call."""
        if self.cache is None:
            return self.encode_prompts(texts)
        keys = [self.prompt_key(text) for text in texts]
        return _look_up(self.cache, dict(zip(keys, texts, strict=True)), keys, self.encode_prompts)

    def image(self, ref: ImageRef, row_id: str, crop_id: int = 0, flip: bool = False) -> Record:
        """The features of one image under one crop and flip."""
        return self.images([ref], [row_id], [crop_id], [flip])[0]

    def images(
        self, refs: Sequence[ImageRef], row_ids: Sequence[str], crop_ids: Sequence[int], flips: Sequence[bool]
    ) -> list[Record]:
        """The features of each image, its row's crop and flip applied; what is missing is encoded in one call.

        Raises `DataError` naming the image that cannot be read.
        """
        requests = list(zip(refs, row_ids, crop_ids, flips, strict=True))
        if self.cache is None:
            return self.encode_images([self.prepare(*request) for request in requests], [r.source for r in refs])
        entries = [self._entry(*request) for request in requests]
        return look_up_images(self.cache, entries, self.encode_images)

    def variants(self) -> list[tuple[int, bool]]:
        """All (crop id, flip) that the config can ask for."""
        num_crops = self.config.num_crops if self.config.crop == "random" else 1
        flips = (False, True) if self.config.flip else (False,)
        return [(crop_id, flip) for crop_id in range(num_crops) for flip in flips]

    def crop(self, row_id: str, crop_id: int) -> tuple[float, float]:
        """(y, x) as fractions of the free range. Both images of a row get the same."""
        if self.config.crop == "center":
            return CENTRE
        return uniform(self.seed, "crop_y", row_id, crop_id), uniform(self.seed, "crop_x", row_id, crop_id)

    def prepare(self, ref: ImageRef, row_id: str, crop_id: int, flip: bool) -> PreparedImage:
        """Decoded, resized, flipped, cropped."""
        return prepare_image(ref.open(), resolution=self.resolution, crop=self.crop(row_id, crop_id), flip=flip)

    def prompt_key(self, text: str) -> str:
        return feature_key("prompt", self.policy.encode_key("prompt"), text)

    def image_key(self, ref: ImageRef, row_id: str, crop_id: int, flip: bool) -> str:
        digest, crop = self._digests.digest(ref), self.crop(row_id, crop_id)
        return feature_key("image", self.policy.encode_key("image"), digest, self.resolution, *crop, bool(flip))

    def encode_prompts(self, texts: Sequence[str]) -> list[Record]:
        with self._encoding:
            records = self.policy.encode_prompts(list(texts))
        return checked_records(records, [f"prompt {text[:80]!r}" for text in texts], OVERFLOW)

    def encode_images(self, images: Sequence[PreparedImage], sources: Sequence[str]) -> list[Record]:
        prepared: list[Any] = list(images)
        with self._encoding:
            records = self.policy.encode_images(prepared)
        return checked_records(records, sources, OVERFLOW)


def _image_response(row: Row, side: Side) -> ImageRef:
    found = row.chosen if side == "chosen" else row.rejected
    if not isinstance(found, ImageRef):
        held = "text" if isinstance(found, str) else "nothing"
        raise DataError(f"{row.source}: `{side}` holds {held}; a model that draws images needs an image there")
    return found


def look_up_images(
    cache: FeatureCache, entries: Sequence[Entry], encode: Callable[[Sequence[Any], Sequence[str]], list[Record]]
) -> list[Record]:
    """The record of each entry; what the cache lacks is encoded in one call, each once, and kept."""

    def encode_entries(missing: Sequence[Entry]) -> list[Record]:
        return encode([entry.prepare() for entry in missing], [entry.source for entry in missing])

    keys = [entry.key for entry in entries]
    return _look_up(cache, dict(zip(keys, entries, strict=True)), keys, encode_entries)


def _look_up(
    cache: FeatureCache, wanted: dict[str, Any], keys: Sequence[str], encode: Callable[[list[Any]], list[Record]]
) -> list[Record]:
    """The record of each key; what the cache lacks is encoded in one call, each once, and kept."""
    found = {key: cache.get(key) for key in wanted}
    missing = [key for key, record in found.items() if record is None]
    if missing:
        for key, record in zip(missing, encode([wanted[key] for key in missing]), strict=True):
            cache.put(key, record)
            found[key] = record
    records = [found[key] for key in keys]
    return [record for record in records if record is not None]


def checked_records(records: Sequence[Record], sources: Sequence[str], hint: str) -> list[Record]:
    """Own, contiguous, finite CPU tensors, one record per source."""
    import torch

    if len(records) != len(sources):
        raise ValueError(
            f"the encoder gave {len(records)} records for {len(sources)} inputs; it must give one for each"
        )
    result = []
    for record, source in zip(records, sources, strict=True):
        # Cloned, because an entry may be a view into the whole batch and would keep all of it alive.
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in record.items()}
        for name, tensor in own.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{source}: the encoder gave NaN or infinity in {name!r}; {hint}")
        result.append(own)
    return result
