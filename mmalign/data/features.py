"""Encoded prompts and images for a batch: from the cache where there is one, else from the frozen encoders.

With and without a cache the same records come out: what is encoded, and how it is cropped and flipped, depends on the
image, the row id and the seed alone.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmalign.data.cache import FeatureCache, feature_key
from mmalign.data.digests import DigestIndex
from mmalign.data.images import PreparedImage, prepare_image
from mmalign.randomness import uniform
from mmalign.types import ImageRef

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import DataConfig
    from mmalign.policies.base import Policy

    Record = dict[str, Tensor]

CENTRE = (0.5, 0.5)


class Features:
    """Looks up or encodes. May be called from several threads; the policy is called from one at a time.

    Args:
        policy: whose frozen encoders are used.
        config: the `data` section.
        cache: None encodes at every call and keeps nothing.
        seed: of the run; random crops depend on it.
    """

    def __init__(self, policy: Policy, config: DataConfig, cache: FeatureCache | None, *, seed: int) -> None:
        self.policy, self.config, self.cache, self.seed = policy, config, cache, seed
        self.resolution = config.resolution or policy.resolution
        self._digests = cache.digests if cache is not None else DigestIndex(None)
        self._encoding = threading.Lock()

    def prompt(self, text: str) -> Record:
        """The text features of one prompt."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[Record]:
        """The text features of each prompt; what is missing is encoded in one call."""
        if self.cache is None:
            return self.encode_prompts(texts)
        keys = [self.prompt_key(text) for text in texts]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if found[key] is None}
        if missing:
            for key, record in zip(missing, self.encode_prompts(list(missing.values())), strict=True):
                self.cache.put(key, record)
                found[key] = record
        return _all(found, keys)

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
        keys = [self.image_key(*request) for request in requests]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        missing = {key: request for key, request in zip(keys, requests, strict=True) if found[key] is None}
        if missing:
            prepared = [self.prepare(*request) for request in missing.values()]
            records = self.encode_images(prepared, [request[0].source for request in missing.values()])
            for key, record in zip(missing, records, strict=True):
                self.cache.put(key, record)
                found[key] = record
        return _all(found, keys)

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
        """Straight from the encoder."""
        with self._encoding:
            records = self.policy.encode_prompts(list(texts))
        return _checked(records, [f"prompt {text[:80]!r}" for text in texts])

    def encode_images(self, images: Sequence[PreparedImage], sources: Sequence[str]) -> list[Record]:
        """Straight from the encoder. `sources` name the images in errors."""
        prepared: list[Any] = list(images)
        with self._encoding:
            records = self.policy.encode_images(prepared)
        return _checked(records, sources)


def _all(found: dict[str, Record | None], keys: Sequence[str]) -> list[Record]:
    records = [found[key] for key in keys]
    return [record for record in records if record is not None]


def _checked(records: Sequence[Record], sources: Sequence[str]) -> list[Record]:
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
                raise ValueError(
                    f"{source}: the encoder gave NaN or infinity in {name!r}; SDXL's own VAE overflows in fp16: "
                    f"set model.dtype to bf16 or fp32, or model.vae to a VAE made for fp16"
                )
        result.append(own)
    return result
