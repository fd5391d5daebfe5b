"""JSON Lines: one object per line, images as paths beside the file or embedded as base64.

    {"prompt": "a red fox", "chosen": "images/1a.png", "rejected": "images/1b.png"}
    {"prompt": "What is this?", "images": ["images/2.png"], "chosen": "A fox.", "rejected": "A dog."}

Embedded images stay on disk: the reference remembers the line's byte offset and decodes it when asked.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmalign.data.fields import (
    BadRow,
    BadValueError,
    Columns,
    RowBuilder,
    digest_of,
    image_bytes,
    parse_image,
    required,
)
from mmalign.data.texts import text_columns_of
from mmalign.types import DataError, ImageRef, Row


@dataclass(frozen=True)
class JsonlImageRef(ImageRef):
    """An image embedded in a line of a JSONL file. `path` is the JSONL file, `offset` the line's first byte, `item` the
    place in a list of images."""

    offset: int = 0
    column: str = ""
    item: int | None = None

    def read_bytes(self) -> bytes:
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                values = json.loads(file.readline())
            value = values[self.column] if self.item is None else values[self.column][self.item]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{self.source}: the file changed while it was in use ({error}); start again") from None
        return image_bytes(value, folder=self.path.parent, source=self.source)


def read_jsonl(
    path: str,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str | None = "rejected",
    id_column: str = "id",
    images_column: str | None = None,
    responses: Literal["auto", "image", "text"] = "auto",
    media: str | None = None,
    columns: list[str] | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Rows of a JSONL file, or of the one JSONL file in a folder: pairs of images, or of texts (`mmalign.data.texts`).

    `preference`, `margin`, `score_chosen` and `score_rejected` are read where present.

    Args:
        prompt_column, chosen_column, rejected_column, id_column: field names. `rejected_column: null`:
            unpaired rows.
        images_column: images that a prompt shows. Default: `images` or `image`.
        responses: whether `chosen` and `rejected` are images or texts. Default: as the first row that tells.
        media: folder that relative image paths start at. Default: the folder of the file.
        columns: further fields to keep for rewards. Default: all.
        allow_empty_prompt: accept empty captions.
    """
    from mmalign.data.records import json_records, text_rows
    from mmalign.data.responses import kind_of_rows

    file = find_jsonl(Path(path).expanduser())
    folder = media_folder(file.parent, media)
    kept = None if columns is None else tuple(columns)
    text_columns = text_columns_of(prompt_column, chosen_column, rejected_column, id_column, images_column, kept)
    if responses == "auto":
        objects = ((f"{file}:{line}", values, folder) for line, _, values in read_objects(file))
        responses = kind_of_rows(
            ((where, values, folder) for where, values, folder in objects if isinstance(values, Mapping)), text_columns
        )
    if responses == "text":
        records = json_records(file, media)
        yield from text_rows(records, text_columns, allow_empty_prompt=allow_empty_prompt)
        return
    names = Columns(prompt_column, chosen_column, rejected_column, id_column, kept)
    builder = RowBuilder(names, allow_empty_prompt)
    for line, offset, values in read_objects(file):
        source = f"{file}:{line}"
        if isinstance(values, BadRow):
            yield values
            continue
        try:
            raw = {name: required(values, name) for name in names.images()}
            images = {name: _image(raw[name], file, offset, name, folder, source) for name in raw}
            if rejected_column is not None and raw[chosen_column] == raw[rejected_column]:
                raise BadValueError(
                    f"{chosen_column!r} and {rejected_column!r} are the same image: nothing to prefer; remove the row"
                )
        except BadValueError as error:
            yield BadRow(source, str(error))
            continue
        yield builder.build(
            values,
            source=source,
            chosen=images[chosen_column],
            rejected=None if rejected_column is None else images[rejected_column],
            identity=digest_of(values.get(prompt_column), *raw.values()),
            extra=names.extra(values),
        )


def _image(value: Any, file: Path, offset: int, name: str, folder: Path, source: str) -> ImageRef:
    where = f"{source} {name}"
    try:
        found = parse_image(value, folder)
    except BadValueError as error:
        raise BadValueError(f"{name!r}: {error}") from None
    if isinstance(found, Path):
        return ImageRef(path=found, source=where)
    return JsonlImageRef(path=file, source=where, offset=offset, column=name)


def media_folder(base: Path, media: str | None) -> Path:
    """Where relative image paths start: `media`, itself relative to the data's folder `base`. Raises `DataError`."""
    folder = base if media is None else base / Path(media).expanduser()
    if not folder.is_dir():
        raise DataError(f"{base}: media folder {str(folder)!r} does not exist; set data.options.media")
    return folder


def find_jsonl(path: Path) -> Path:
    """The file itself, or the one JSONL file in a folder. Raises `DataError`."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    if not path.exists():
        raise DataError(f"data file {str(path)!r} does not exist (relative paths start at {Path.cwd()})")
    listed = ", ".join(p.name for p in found) or "none"
    raise DataError(f"{path}: expected exactly one .jsonl file in the folder, found {listed}; give the file itself")


def read_objects(file: Path) -> Iterator[tuple[int, int, Mapping[str, Any] | BadRow]]:
    """(line number from 1, byte offset, object or `BadRow`) for each line that is not blank."""
    with file.open("rb") as lines:
        offset = 0
        for number, content in enumerate(lines, start=1):
            start = offset
            offset += len(content)
            if number == 1 and content.startswith(codecs.BOM_UTF8):
                content = content[len(codecs.BOM_UTF8) :]
            if content.strip():
                yield number, start, _parse_line(content, f"{file}:{number}")


def _parse_line(content: bytes, source: str) -> Mapping[str, Any] | BadRow:
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        value = content[error.start]
        return BadRow(source, f"not UTF-8: byte 0x{value:02x} at position {error.start}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(source, f"not valid JSON: {error.msg} at column {error.colno}; one object per line is expected")
    except RecursionError:
        return BadRow(source, "not usable JSON: nested too deeply")
    if not isinstance(values, dict):
        return BadRow(source, f"expected a JSON object per line, found {type(values).__name__}")
    return values
