"""What all readers share: the records they yield and the checks on prompts, ids, images and numbers.

A reader makes one `RowBuilder` per call and hands it the raw values of each row; the builder returns a `Row` or a
`BadRow` that says what is wrong and how to fix it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmalign.registry import nearest
from mmalign.types import DataError, ImageRef, Row

NUMBERS = ("preference", "margin", "score_chosen", "score_rejected")
# How the base64 text of PNG, JPEG, GIF, WebP and BMP files starts.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk")
MIN_BASE64_CHARS = 64
MAX_PATH_CHARS = 4096


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `source` is `file:index`; `row_id` is set when it had been read as a row before."""

    source: str
    reason: str
    row_id: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True)
class Dropped:
    """A sound row that a reader's option leaves out. `kind` is the name of its count, e.g. `ties_dropped`."""

    source: str
    kind: str


@dataclass(frozen=True)
class Columns:
    """Where a row's values are: names of the columns (JSON fields). `rejected` None: unpaired rows."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str | None = "rejected"
    id: str = "id"
    keep: tuple[str, ...] | None = None

    def images(self) -> list[str]:
        return [self.chosen] + ([self.rejected] if self.rejected is not None else [])

    def extra(self, available: Iterable[str]) -> list[str]:
        """Columns that become `Row.columns`: those asked for, or all that have no other role."""
        if self.keep is not None:
            return list(self.keep)
        roles = {self.prompt, self.id, *self.images(), *NUMBERS}
        return [name for name in available if name not in roles]


class BadValueError(ValueError):
    """A value that makes its row bad. Caught by `RowBuilder.build`."""


@dataclass
class RowBuilder:
    """Checks raw values and makes rows; keeps count of derived ids, so use one per read.

    Args:
        columns: where values are.
        allow_empty_prompt: accept a row whose prompt is empty or only white space.
    """

    columns: Columns
    allow_empty_prompt: bool = False
    _derived: dict[str, int] = field(default_factory=dict)

    def build(
        self,
        values: Mapping[str, Any],
        *,
        source: str,
        chosen: ImageRef,
        rejected: ImageRef | None,
        identity: str,
        preference: float | None = None,
        extra: Iterable[str] = (),
    ) -> Row | BadRow:
        """One row from raw values.

        Args:
            identity: what the id is derived from when the row brings none. Rows with the same identity get `#2`, `#3` …
            preference: overrides the column of that name.
            extra: names copied to `Row.columns`.
        """
        try:
            prompt = self.prompt(values)
            if rejected is not None and same_image(chosen, rejected):
                raise BadValueError("chosen and rejected are the same image: nothing to prefer; remove the row")
            numbers = numbers_of(values, preference)
            row_id = self.row_id(values, identity)
        except BadValueError as error:
            return BadRow(source, str(error))
        return Row(
            id=row_id,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            preference=numbers.preference,
            margin=numbers.margin,
            score_chosen=numbers.score_chosen,
            score_rejected=numbers.score_rejected,
            source=source,
            columns={name: values[name] for name in extra if name in values},
        )

    def prompt(self, values: Mapping[str, Any]) -> str:
        value = required(values, self.columns.prompt)
        if not isinstance(value, str):
            raise BadValueError(f"{self.columns.prompt!r} is {value!r}; it must be text")
        if not value.strip() and not self.allow_empty_prompt:
            raise BadValueError(
                f"{self.columns.prompt!r} is empty ({value!r}); write a caption, "
                f"or allow it with data.options.allow_empty_prompt: true"
            )
        check_encodable(value, repr(self.columns.prompt))
        return value

    def row_id(self, values: Mapping[str, Any], identity: str) -> str:
        explicit = values.get(self.columns.id)
        if explicit is not None:
            if not isinstance(explicit, (str, int)) or isinstance(explicit, bool) or explicit == "":
                raise BadValueError(f"{self.columns.id!r} is {explicit!r}; an id must be non-empty text or an integer")
            return str(explicit)
        count = self._derived[identity] = self._derived.get(identity, 0) + 1
        return identity if count == 1 else f"{identity}#{count}"


@dataclass(frozen=True)
class Numbers:
    """The numbers a row may bring."""

    preference: float
    margin: float | None
    score_chosen: float | None
    score_rejected: float | None


def numbers_of(values: Mapping[str, Any], preference: float | None = None) -> Numbers:
    """Checked numbers of a row; `preference` overrides the column of that name. Raises `BadValueError`."""
    found = {name: number(values, name) for name in NUMBERS}
    if preference is None:
        preference = 1.0 if found["preference"] is None else found["preference"]
    if not 0.0 <= preference <= 1.0:
        raise BadValueError(f"preference {preference} must be a probability between 0 and 1")
    return Numbers(preference, found["margin"], found["score_chosen"], found["score_rejected"])


def check_encodable(text: str | None, what: str) -> None:
    """Raises `BadValueError` for text that no file could hold."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise BadValueError(f"{what} holds half of a surrogate pair at {error.start}; repair it") from None


def digest_of(*parts: Any) -> str:
    """A short content identity of JSON-like values, for ids that a file does not bring."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def required(values: Mapping[str, Any], name: str) -> Any:
    """`values[name]`, or a `BadValueError` naming what is there and the nearest name."""
    if name not in values:
        raise BadValueError(missing(name, values))
    return values[name]


def missing(name: str, available: Iterable[str]) -> str:
    """`no column 'prompt' (did you mean 'promt'?)` and what there is."""
    known = list(available)
    return (
        f"no column {name!r}{nearest(name, known)}. Columns: {', '.join(map(str, known)) or 'none'}; "
        f"name yours with data.options, e.g. {{prompt_column: caption}}"
    )


def number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadValueError(f"{name!r} is {value!r}; it must be a finite number or null")
    return float(value)


def same_image(first: ImageRef, second: ImageRef) -> bool:
    """Whether two references are certainly the same image, told without reading a file."""
    if first.content is not None and second.content is not None:
        return first.content == second.content
    # References into tables are subclasses that share one file; their cells are compared when they are read.
    if type(first) is ImageRef and type(second) is ImageRef:
        return first.path is not None and first.path == second.path
    return False


def image_bytes(value: Any, *, folder: Path, source: str) -> bytes:
    """The encoded bytes behind a raw cell: bytes, base64 text, a path, or a {"bytes", "path"} record.

    Raises `DataError` naming `source`.
    """
    try:
        found = parse_image(value, folder)
    except BadValueError as error:
        raise DataError(f"{source}: {error}") from None
    if isinstance(found, bytes):
        return found
    return ImageRef(path=found, source=source).read_bytes()


def parse_image(value: Any, folder: Path) -> bytes | Path:
    """Encoded bytes, or the path of an existing file. Relative paths start at `folder`. Raises `BadValueError`."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is None:
            raise BadValueError(f'an image record needs "bytes" or "path", found {sorted(value)} (both null)')
        return parse_image(content if content is not None else path, folder)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return _parse_text(value, folder)
    raise BadValueError(
        f"an image must be a path, base64 text or bytes, found {type(value).__name__} {str(value)[:40]!r}"
    )


def _parse_text(text: str, folder: Path) -> bytes | Path:
    if text.startswith("data:"):
        header, comma, payload = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise BadValueError(f"data URI {text[:40]!r}… must be of the form data:image/png;base64,…")
        return _decode_base64(payload)
    if text.startswith(("http://", "https://")):
        raise BadValueError(f"{text!r} is a URL; images are not fetched while training: download them and give paths")
    if not text:
        raise BadValueError("the image path is empty")
    if len(text) <= MAX_PATH_CHARS and "\0" not in text:
        path = folder / text
        try:
            if path.is_file():
                return path
        except OSError:
            pass  # A name too long for the file system is no file; it may be base64.
    if len(text) >= MIN_BASE64_CHARS and text.startswith(BASE64_STARTS):
        return _decode_base64(text)
    shown = text if len(text) <= 200 else f"{text[:60]}…"
    raise BadValueError(f"image file {shown!r} does not exist (relative paths start at {folder})")


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadValueError(f"base64 image {text[:24]!r}… cannot be decoded: {error}") from None
