"""Rows of any file as light values, with their images by reference: what the readers of text rows stand on.

JSONL and JSON files, Parquet files and folders, and Hugging Face datasets look the same from here. Image cells hold a
path, base64 text, a {"bytes", "path"} record, or a list of these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.data.fields import BadRow, BadValueError, digest_of, parse_image
from mmalign.data.jsonl import JsonlImageRef, find_jsonl, media_folder, read_objects
from mmalign.data.tables import (
    ParquetTable,
    Table,
    check_columns,
    check_light,
    is_saved_dataset,
    open_dataset,
    parquet_files,
)
from mmalign.data.texts import TextBuilder, TextColumns
from mmalign.types import DataError, ImageRef, Row

NamedImages = list[tuple[ImageRef, str]]
JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Record:
    """One row. `images` gives references to the images in a column, each with a name that does not depend on where the
    data lies; it raises `BadValueError`."""

    source: str
    values: Mapping[str, Any]
    images: Callable[[str], NamedImages]


def text_rows(
    records: Iterable[Record | BadRow],
    columns: TextColumns,
    *,
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    with_responses: bool = True,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Text rows from records.

    Args:
        convert: brings the values of another format to ours; may raise `BadValueError`.
        with_responses: False for questions.
    """
    builder = TextBuilder(columns, with_responses, allow_empty_prompt)
    for record in records:
        if isinstance(record, BadRow):
            yield record
            continue
        try:
            values = record.values if convert is None else convert(record.values)
            images = _first_filled(record, columns.images)
            rejected_images = _first_filled(record, columns.rejected_images)
        except BadValueError as error:
            yield BadRow(record.source, str(error))
            continue
        yield builder.build(values, source=record.source, images=images, rejected_images=rejected_images)


def _first_filled(record: Record, columns: Sequence[str]) -> NamedImages:
    for column in columns:
        found = record.images(column)
        if found:
            return found
    return []


def open_records(
    path: str,
    columns: TextColumns,
    *,
    needed: Sequence[str] = (),
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    media: str | None = None,
) -> Iterator[Record | BadRow]:
    """Records of a JSONL, JSON, Parquet or Arrow file, a folder of them, a saved dataset or a hub id.

    Args:
        columns: which columns hold images, and which to keep.
        needed: columns that a table must have.
        split, name, revision: part of a table; for datasets.
        media: folder that relative image paths start at. Default: that of the file.

    Raises `DataError` when there is no such data.
    """
    local = Path(path).expanduser()
    file = _json_file(local)
    if file is not None:
        return json_records(file, media)
    if local.exists() and not is_saved_dataset(local) and local.suffix.lower() in ("", ".parquet"):
        return table_records(ParquetTable(path, parquet_files(local, split)), columns, needed, media)
    table = open_dataset(path, split=split or "train", name=name, revision=revision)
    return table_records(table, columns, needed, media)


def _json_file(path: Path) -> Path | None:
    """The JSON or JSONL file that `path` is, or the only one in a folder without tables."""
    if path.is_file():
        return path if path.suffix.lower() in (*JSONL_SUFFIXES, ".json") else None
    if not path.is_dir() or is_saved_dataset(path) or next(path.rglob("*.parquet"), None) is not None:
        return None
    found = sorted(path.glob("*.json"))
    return found[0] if len(found) == 1 and not any(path.glob("*.jsonl")) else find_jsonl(path)


def json_records(file: Path, media: str | None) -> Iterator[Record | BadRow]:
    """Objects of a JSONL file (places are lines, from 1) or of the list in a JSON file (places are indices, from 0)."""
    folder = media_folder(file.parent, media)
    if file.suffix.lower() not in JSONL_SUFFIXES:
        for index, values in enumerate(read_list(file)):
            source = f"{file}:{index}"
            if isinstance(values, Mapping):
                yield Record(source, values, _JsonImages(values, folder, source))
            else:
                yield BadRow(source, f"expected a JSON object, found {type(values).__name__}")
        return
    for line, offset, values in read_objects(file):
        source = f"{file}:{line}"
        if isinstance(values, BadRow):
            yield values
        else:
            yield Record(source, values, _JsonImages(values, folder, source, file, offset))


def read_list(file: Path) -> list[Any]:
    """The list that a JSON file holds. Raises `DataError`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not readable JSON: {error}") from None
    if not isinstance(values, list):
        raise DataError(f"{file}: expected a list of rows, found {type(values).__name__}")
    return values


@dataclass(frozen=True)
class _JsonImages:
    values: Mapping[str, Any]
    folder: Path
    source: str
    file: Path | None = None
    offset: int = 0

    def __call__(self, column: str) -> NamedImages:
        cell = self.values.get(column)
        if cell is None:
            return []
        items = cell if isinstance(cell, list) else [cell]
        return [self._image(item, column, n if isinstance(cell, list) else None) for n, item in enumerate(items)]

    def _image(self, value: Any, column: str, item: int | None) -> tuple[ImageRef, str]:
        where = column if item is None else f"{column}[{item}]"
        found = _parse(value, self.folder, where)
        source = f"{self.source} {where}"
        name = value if isinstance(value, str) and isinstance(found, Path) else digest_of(value)
        if isinstance(found, Path):
            return ImageRef(path=found, source=source), name
        if self.file is None:
            return ImageRef(content=found, source=source), name
        return JsonlImageRef(path=self.file, source=source, offset=self.offset, column=column, item=item), name


def table_records(
    table: Table, columns: TextColumns, needed: Sequence[str] = (), media: str | None = None
) -> Iterator[Record]:
    """Rows of a table. Image cells are read when their pixels are needed; here they are only counted."""
    check_columns(table, [*needed, *(columns.keep or ())])
    check_light(table, [*needed, *(columns.keep or ())])
    image_columns = [name for name in (*columns.images, *columns.rejected_images) if name in table.column_names]
    counted = [name for name in image_columns if not table.is_light(name)]
    wanted = {*columns.roles(), *needed, *columns.extra(table.column_names)}
    light = [name for name in table.column_names if name in wanted and table.is_light(name)]
    for position, source, values in table.rows(light, counted):
        folder = table.folder(position) if media is None else media_folder(table.folder(position), media)
        images = _TableImages(table, position, source, values, frozenset(counted), folder)
        yield Record(source, {key: value for key, value in values.items() if key not in counted}, images)


@dataclass(frozen=True)
class _TableImages:
    table: Table
    position: Any
    source: str
    values: Mapping[str, Any]
    counted: frozenset[str]
    folder: Path

    def __call__(self, column: str) -> NamedImages:
        cell = self.values.get(column)
        if cell is None:
            return []
        if column not in self.counted:
            items = cell if isinstance(cell, list) else [cell]
            return [self._by_path(item, column, n if isinstance(cell, list) else None) for n, item in enumerate(items)]
        in_list = self.table.is_list(column)
        return [self._by_cell(column, number if in_list else None) for number in range(cell)]

    def _by_path(self, value: Any, column: str, item: int | None) -> tuple[ImageRef, str]:
        where = column if item is None else f"{column}[{item}]"
        found = _parse(value, self.folder, where)
        if isinstance(found, Path):
            return ImageRef(path=found, source=f"{self.source} {where}"), str(value)
        return self._by_cell(column, item)

    def _by_cell(self, column: str, item: int | None) -> tuple[ImageRef, str]:
        where = column if item is None else f"{column}[{item}]"
        place = self.source.replace("\\", "/").rpartition("/")[2]
        return self.table.image(self.position, column, f"{self.source} {where}", item), f"{place} {where}"


def _parse(value: Any, folder: Path, where: str) -> bytes | Path:
    try:
        return parse_image(value, folder)
    except BadValueError as error:
        raise BadValueError(f"{where!r}: {error}") from None
