"""Token ids and vision features for policies that answer in text, and the image negatives of a row."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmalign.config import NegativeConfig
from mmalign.data.cache import FeatureCache, feature_key
from mmalign.data.digests import DigestIndex
from mmalign.data.features import SIDES, Entry, Kind, checked_records, look_up_images
from mmalign.data.negatives import Others, black, make_negative
from mmalign.data.texts import response_problem
from mmalign.types import DataError, ImageRef, Row, Side

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmalign.config import DataConfig

    Record = dict[str, Tensor]

OVERFLOW = "set model.dtype to bf16 or fp32"


class TextFeatures:
    """Token ids and vision features for policies that answer in text.

    Every image has a key of its content and what was done to it: it is encoded once, and the policy shares a prefix only
    between requests with the same keys.

    Args:
        policy: tokenizes rows and encodes images.
        config: the `data` section.
        cache: None encodes at every call and keeps nothing.
        seed: of the run; image negatives depend on it.
        rows: all rows of the run; needed for `image_negative.kind: other` alone.
        with_negatives: whether `image_entries` names the negatives too.
        sides: the responses that the method reads.
    """

    def __init__(
        self,
        policy: Any,
        config: DataConfig,
        cache: FeatureCache | None,
        *,
        seed: int,
        rows: Sequence[Row] = (),
        with_negatives: bool = False,
        sides: Sequence[Side] = SIDES,
    ) -> None:
        self.policy, self.config, self.cache, self.seed, self.sides = policy, config, cache, seed, sides
        self.negative = config.image_negative or NegativeConfig()
        self.with_negatives = with_negatives
        self._rows = rows
        self._others: Others | None = None
        self._digests = cache.digests if cache is not None else DigestIndex(None)
        self._readable: set[str] = set()
        self._encoding = threading.Lock()
        self._tokenizing = threading.Lock()
        self._picking = threading.Lock()

    def contexts(self, rows: Sequence[Row], visits: Sequence[int]) -> list[Any]:
        return self._contexts(rows, [self._shown(row) for row in rows])

    def targets(self, rows: Sequence[Row], side: Side, visits: Sequence[int]) -> list[Any]:
        from mmalign.policies.tokens import TokenTarget

        return [TokenTarget(self._tokenize(row, side)[1]) for row in rows]

    def negatives(self, rows: Sequence[Row], visits: Sequence[int]) -> list[Any]:
        for row in rows:
            if not row.images:
                raise DataError(f"{row.source}: the row shows no image, so there is none to contrast it with")
        variants = [visit % self.negative.variants for visit in visits]
        entries = [self._negatives(row, variant) for row, variant in zip(rows, variants, strict=True)]
        replaced = [replace(row, images=row.rejected_images) if row.rejected_images else row for row in rows]
        return self._contexts(replaced, entries)

    def problem(self, row: Row) -> str | None:
        found = response_problem(row)
        if found is not None:
            return found
        if self.with_negatives and not row.images:
            return "the prompt shows no image, so the method has no image to contrast it with"
        if row.chosen is None:
            return None
        try:
            sides = [[ids.tolist() for ids in self._tokenize(row, side)] for side in _sides(row)]
        except ValueError as error:
            return str(error).removeprefix(f"{row.source}: ")
        if any(prompt != sides[0][0] for prompt, _ in sides):
            return "chosen and rejected would need different prompts after truncation; raise data.max_length"
        if len(sides) == 2 and sides[0][1] == sides[1][1]:
            fix = "raise data.max_length or remove the row" if row.id in self.policy.truncated else "remove the row"
            return f"chosen and rejected are the same {len(sides[0][1])} tokens to the model: nothing to prefer; {fix}"
        return None

    def prompt_entries(self, rows: Sequence[Row]) -> list[Entry]:
        return []  # Token ids are made anew for each batch; that costs less than reading them.

    def images_of(self, row: Row) -> list[ImageRef]:
        return [*row.images, *(row.rejected_images if self.with_negatives else ())]

    def image_entries(self, row: Row) -> list[Entry]:
        shown = self._shown(row)
        if not self.with_negatives:
            return shown
        num_variants = 1 if row.rejected_images else self.negative.variants
        return shown + [entry for variant in range(num_variants) for entry in self._negatives(row, variant)]

    def encode(self, kind: Kind, inputs: Sequence[Any], sources: Sequence[str]) -> list[Record]:
        assert kind == "image"
        return self.encode_images(inputs, sources)

    def encode_images(self, images: Sequence[Image.Image], sources: Sequence[str]) -> list[Record]:
        with self._encoding:
            records = self.policy.encode_images(list(images))
        return checked_records(records, sources, OVERFLOW)

    def _contexts(self, rows: Sequence[Row], entries: Sequence[Sequence[Entry]]) -> list[Any]:
        from mmalign.policies.tokens import TokenContext

        records = iter(self._vision([entry for of_row in entries for entry in of_row]))
        return [
            TokenContext(
                ids=self._tokenize(row, _sides(row)[0])[0],
                features=tuple(next(records)["features"] for _ in of_row),
                image_ids=tuple(entry.key for entry in of_row),
            )
            for row, of_row in zip(rows, entries, strict=True)
        ]

    def _vision(self, entries: Sequence[Entry]) -> list[Record]:
        """The vision features of each entry; what is missing is encoded in one call, each different image once."""
        if self.cache is not None:
            return look_up_images(self.cache, entries, self.encode_images)
        unique = {entry.key: entry for entry in entries}
        if not unique:
            return []
        images = [entry.prepare() for entry in unique.values()]
        found = dict(zip(unique, self.encode_images(images, [entry.source for entry in unique.values()]), strict=True))
        return [found[entry.key] for entry in entries]

    def _tokenize(self, row: Row, side: Side) -> tuple[Tensor, Tensor]:
        # Fast tokenizers refuse to be used from two threads at once.
        with self._tokenizing:
            ids_P, ids_T = self.policy.tokenize(row, side)
        return ids_P, ids_T

    def _shown(self, row: Row) -> list[Entry]:
        return [self._black(ref) if self.config.blind else self._as_is(ref) for ref in row.images]

    def _as_is(self, ref: ImageRef) -> Entry:
        return Entry(self._key(ref), ref.source, ref.open)

    def _black(self, ref: ImageRef) -> Entry:
        return Entry(self._key(ref, "black"), ref.source, lambda: black(ref.open()))

    def _negatives(self, row: Row, variant: int) -> list[Entry]:
        if self.config.blind or (self.negative.kind == "black" and not row.rejected_images):
            return [self._black(ref) for ref in row.rejected_images or row.images]
        if row.rejected_images:
            return [self._as_is(ref) for ref in row.rejected_images]
        return [self._negative(row, ref, place, variant) for place, ref in enumerate(row.images)]

    def _negative(self, row: Row, ref: ImageRef, place: int, variant: int) -> Entry:
        config = self.negative
        if config.kind == "other":
            return self._as_is(self._other(row, place, variant))
        parts = [config.kind, self.seed, row.id, place, variant, *(config.area if config.kind == "crop" else ())]

        def prepare() -> Image.Image:
            return make_negative(ref.open(), config, seed=self.seed, row_id=row.id, variant=variant, place=place)

        return Entry(self._key(ref, *parts), ref.source, prepare)

    def _other(self, row: Row, place: int, variant: int) -> ImageRef:
        """Another row's image that can be read and that this row does not show."""
        with self._picking:
            if self._others is None:
                self._others = Others(list(self._all_images()), self._digests.digest, self.seed)
        own = {self._digests.digest(ref) for ref in row.images}
        for digest, ref in self._others.candidates(row.id, variant, place, own):
            if self._is_readable(digest, ref):
                return ref
        raise DataError(
            f"{row.source}: no other row shows a different image, so data.image_negative.kind: other has nothing to "
            f"take; use kind: crop"
        )

    def _all_images(self) -> Iterator[ImageRef]:
        for row in self._rows:
            for ref in row.images:
                with suppress(DataError):  # An unreadable image is its own row's problem.
                    self._digests.digest(ref)
                    yield ref

    def _is_readable(self, digest: str, ref: ImageRef) -> bool:
        if digest in self._readable:
            return True
        if self.cache is None or self.cache.size(self._key(ref)) is None:
            try:
                ref.open()
            except DataError:
                return False
        self._readable.add(digest)
        return True

    def _key(self, ref: ImageRef, *done: Any) -> str:
        """Identity of an image and of what was done to it."""
        return feature_key("vision", self.policy.encode_key("image"), self._digests.digest(ref), *done)


def _sides(row: Row) -> list[Side]:
    """The sides that hold a response; a row with a prompt alone has its (empty) chosen side tokenized."""
    return ["chosen", "rejected"] if row.rejected is not None else ["chosen"]
