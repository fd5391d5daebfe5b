"""Parquet files and Hugging Face datasets: rows are read at once, image cells only when their pixels are needed.

A `Table` gives the light columns of each row and references to its image cells. `read_parquet` and `read_hub` name the
columns; `pickapic.read_pickapic` reads the same tables under a fixed schema.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmalign.data.fields import (
    BadRow,
    BadValue,
    Columns,
    RowBuilder,
    digest_of,
    image_bytes,
    missing,
    parse_image,
)
from mmalign.types import DataError, ImageRef, Row

SHARD_NAME = re.compile(r"^(?P<split>.+)-\d{5}-of-\d{5}")
BATCH_ROWS = 4096
COLUMN_CHUNKS_KEPT = 4


class Table(Protocol):
    """Rows with light columns, and images by reference."""

    label: str
    column_names: list[str]

    def is_light(self, column: str) -> bool:
        """Whether the column's values may be held in memory for all rows (no binary data)."""

    def is_path(self, column: str) -> bool:
        """Whether the column holds text, i.e. paths of image files."""

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Any, str, Mapping[str, Any]]]:
        """(position, source, values of `columns`) for each row."""

    def image(self, position: Any, column: str, source: str) -> ImageRef:
        """A reference to one image cell."""

    def folder(self, position: Any) -> Path:
        """Where relative image paths of the row start."""


@dataclass(frozen=True)
class ParquetImageRef(ImageRef):
    """One cell of a Parquet file. `path` is that file, `row` counts from its first row."""

    row: int = 0
    column: str = ""

    def read_bytes(self) -> bytes:
        assert self.path is not None
        value = _CELLS.read(self.path, self.row, self.column, self.source)
        return image_bytes(value, folder=self.path.parent, source=self.source)


@dataclass(frozen=True)
class DatasetImageRef(ImageRef):
    """One cell of a Hugging Face dataset. `path` names the dataset; `column_table` holds this one column, undecoded."""

    row: int = 0
    column: str = ""
    column_table: Any = field(default=None, repr=False, compare=False)

    def read_bytes(self) -> bytes:
        assert self.path is not None
        value = self.column_table[self.row][self.column]
        return image_bytes(value, folder=self.path, source=self.source)


class _ParquetCells:
    """Column chunks of the last few row groups, shared by all references of a process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, tuple[Any, list[int]]] = OrderedDict()
        self._chunks: OrderedDict[tuple[Path, int, str], Any] = OrderedDict()

    def read(self, path: Path, row: int, column: str, source: str) -> Any:
        import pyarrow as pa

        with self._lock:
            try:
                file, starts = self._open(path)
                group = next((g for g in range(len(starts) - 1) if starts[g] <= row < starts[g + 1]), None)
                if group is None:
                    raise DataError(f"{source}: {path} has only {starts[-1]} rows now; it changed while it was in use")
                key = (path, group, column)
                if key not in self._chunks:
                    self._chunks[key] = file.read_row_group(group, columns=[column]).column(0)
                    while len(self._chunks) > COLUMN_CHUNKS_KEPT:
                        self._chunks.popitem(last=False)
                self._chunks.move_to_end(key)
                return self._chunks[key][row - starts[group]].as_py()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{source}: cannot read {path}: {' '.join(str(error).split())}") from None

    def _open(self, path: Path) -> tuple[Any, list[int]]:
        import pyarrow.parquet as pq

        if path not in self._files:
            file = pq.ParquetFile(path)
            starts = [0]
            for group in range(file.metadata.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            self._files[path] = (file, starts)
            while len(self._files) > 2 * COLUMN_CHUNKS_KEPT:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return self._files[path]


_CELLS = _ParquetCells()
# A forked loader process must not share open files (and a lock that may be held) with its parent.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_CELLS.forget)


class ParquetTable:
    """One or several Parquet files with the same columns."""

    def __init__(self, label: str, files: Sequence[Path]) -> None:
        self.label = label
        self.files = list(files)
        self._schema = _read_schema(self.files[0])
        self.column_names = list(self._schema.names)

    def is_light(self, column: str) -> bool:
        return not _holds_binary(self._schema.field(column).type)

    def is_path(self, column: str) -> bool:
        import pyarrow as pa

        kind = self._schema.field(column).type
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Any, str, Mapping[str, Any]]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in self.files:
            absent = [name for name in columns if name not in _read_schema(path).names]
            if absent:
                raise DataError(f"{path}: {missing(absent[0], _read_schema(path).names)}")
            row = 0
            try:
                with pq.ParquetFile(path) as file:
                    if not columns:
                        for row in range(file.metadata.num_rows):
                            yield (path, row), f"{path}:{row}", {}
                        continue
                    for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                        for values in batch.to_pylist():
                            yield (path, row), f"{path}:{row}", values
                            row += 1
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                raise DataError(f"{path}: cannot read rows from {row} on: {' '.join(str(error).split())}") from None

    def image(self, position: Any, column: str, source: str) -> ImageRef:
        path, row = position
        return ParquetImageRef(path=path, source=source, row=row, column=column)

    def folder(self, position: Any) -> Path:
        return position[0].parent


class DatasetTable:
    """A `datasets.Dataset`, memory-mapped; images stay encoded."""

    def __init__(self, label: str, dataset: Any, folder: Path) -> None:
        from datasets import Image

        for name, feature in dataset.features.items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(name, Image(decode=False))
        self.label = label
        self._dataset = dataset
        self._folder = folder
        self._columns: dict[str, Any] = {}
        self.column_names = list(dataset.column_names)

    def is_light(self, column: str) -> bool:
        from datasets import Image

        if isinstance(self._dataset.features[column], Image):
            return False
        return not _holds_binary(self._dataset.features.arrow_schema.field(column).type)

    def is_path(self, column: str) -> bool:
        return getattr(self._dataset.features[column], "dtype", None) in ("string", "large_string")

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Any, str, Mapping[str, Any]]]:
        light = self._dataset.select_columns(list(columns)) if columns else [{}] * len(self._dataset)
        for row, values in enumerate(light):
            yield row, f"{self.label}:{row}", values

    def image(self, position: Any, column: str, source: str) -> ImageRef:
        if column not in self._columns:
            self._columns[column] = self._dataset.select_columns([column])
        return DatasetImageRef(
            path=self._folder, source=source, row=position, column=column, column_table=self._columns[column]
        )

    def folder(self, position: Any) -> Path:
        return self._folder


def _holds_binary(kind: Any) -> bool:
    import pyarrow as pa

    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    if any(check(kind) for check in binary):
        return True
    return any(_holds_binary(kind.field(index).type) for index in range(kind.num_fields))


def _read_schema(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None


def parquet_files(path: Path, split: str | None) -> list[Path]:
    """The file itself, or all Parquet files below a folder that belong to `split`. Raises `DataError`.

    A file's split is its name before `-00000-of-00010`. A folder that holds several asks for a choice, so that test
    rows never slip into training.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"data path {str(path)!r} does not exist (relative paths start at {Path.cwd()})")
    files = sorted(path.rglob("*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = SHARD_NAME.match(file.name)
        splits.setdefault(match["split"] if match else "", []).append(file)
    if not files:
        raise DataError(f"{path}: no .parquet files below this folder")
    if split is None:
        if len(splits) > 1:
            named = ", ".join(name or "(unnamed)" for name in splits)
            raise DataError(f"{path}: holds the splits {named}; choose one with data.options.split")
        return files
    if split in splits:
        return splits[split]
    if list(splits) == [""]:
        raise DataError(f"{path}: its files name no split, so {split!r} cannot be chosen; set data.options.split: null")
    raise DataError(f"{path}: no split {split!r}; splits: {', '.join(name or '(unnamed)' for name in splits)}")


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` was written by `datasets.save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_dataset(path: str, *, split: str, name: str | None = None, revision: str | None = None) -> DatasetTable:
    """A dataset saved to disk, a local folder or file that `datasets` understands, or a hub id. Raises `DataError`."""
    import datasets

    local = Path(path).expanduser()
    label = f"{path}[{split}]"
    try:
        if is_saved_dataset(local):
            loaded = datasets.load_from_disk(str(local))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise DataError(f"{path}: no split {split!r}; splits: {', '.join(loaded)}")
                loaded = loaded[split]
            return DatasetTable(label, loaded, local)
        if local.is_file():
            builder = {".jsonl": "json", ".arrow": "arrow", ".parquet": "parquet", ".csv": "csv"}.get(local.suffix)
            if builder is None:
                raise DataError(f"{path}: {local.suffix!r} files cannot be loaded; allowed: arrow, csv, jsonl, parquet")
            dataset = datasets.load_dataset(builder, data_files={"train": str(local)}, split=split)
            return DatasetTable(label, dataset, local.parent)
        source = str(local) if local.is_dir() else path
        dataset = datasets.load_dataset(source, name, split=split, revision=revision)
        return DatasetTable(label, dataset, local if local.is_dir() else Path(path))
    except DataError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"dataset {path!r} (split {split!r}, name {name!r}) cannot be loaded: {reason}. Give a hub id, a folder "
            f"written by save_to_disk, or a local file or folder; a gated dataset needs `hf auth login`"
        ) from error


def read_parquet(
    path: str,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str | None = "rejected",
    id_column: str = "id",
    split: str | None = None,
    columns: list[str] | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file or of all Parquet files below a folder.

    Images are bytes, {"bytes", "path"} records, or paths relative to the Parquet file. `preference`, `margin`,
    `score_chosen` and `score_rejected` are read where present.

    Args:
        prompt_column, chosen_column, rejected_column, id_column: column names. `rejected_column: null`: unpaired rows.
        split: part of the file names before `-00000-of-00010`; needed where a folder holds several.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
        allow_empty_prompt: accept empty captions.
    """
    table = ParquetTable(path, parquet_files(Path(path).expanduser(), split))
    names = Columns(prompt_column, chosen_column, rejected_column, id_column, None if columns is None else tuple(columns))
    return _read_pairs(table, names, allow_empty_prompt)


def read_hub(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str | None = "rejected",
    id_column: str = "id",
    columns: list[str] | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Rows of a Hugging Face dataset: hub id, folder written by `save_to_disk`, or local data that `datasets` loads.

    Args:
        split: e.g. `train`, `validation`, `train[:1000]`.
        name: configuration (subset) of the dataset.
        revision: branch, tag or commit on the hub.
        prompt_column, chosen_column, rejected_column, id_column: column names. `rejected_column: null`: unpaired rows.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
        allow_empty_prompt: accept empty captions.
    """
    table = open_dataset(path, split=split, name=name, revision=revision)
    names = Columns(prompt_column, chosen_column, rejected_column, id_column, None if columns is None else tuple(columns))
    return _read_pairs(table, names, allow_empty_prompt)


def check_columns(table: Table, needed: Sequence[str], hint: str = "") -> None:
    """Raise `DataError` naming the first absent column, the nearest name and what is there."""
    for name in needed:
        if name not in table.column_names:
            raise DataError(f"{table.label}: {missing(name, table.column_names)}{hint}")


def _read_pairs(table: Table, names: Columns, allow_empty_prompt: bool) -> Iterator[Row | BadRow]:
    looks_like_pickapic = {"jpg_0", "jpg_1", "label_0"} <= set(table.column_names)
    hint = ". This is the Pick-a-Pic schema: set data.format: pickapic" if looks_like_pickapic else ""
    check_columns(table, [names.prompt, *names.images(), *(names.keep or ())], hint)
    image_columns = names.images()
    extra = [name for name in names.extra(table.column_names) if table.is_light(name)]
    by_path = [name for name in image_columns if table.is_path(name)]
    numbers = [n for n in ("preference", "margin", "score_chosen", "score_rejected", names.id) if n in table.column_names]
    builder = RowBuilder(names, allow_empty_prompt)
    for position, source, values in table.rows(list(dict.fromkeys([names.prompt, *numbers, *extra, *by_path]))):
        try:
            images = {name: _cell(table, position, name, source, values) for name in image_columns}
        except BadValue as error:
            yield BadRow(source, str(error))
            continue
        where = [str(values[name]) if name in by_path else f"{_name(source)} {name}" for name in image_columns]
        yield builder.build(
            values,
            source=source,
            chosen=images[names.chosen],
            rejected=None if names.rejected is None else images[names.rejected],
            identity=digest_of(values.get(names.prompt), *where),
            extra=extra,
        )


def _cell(table: Table, position: Any, name: str, source: str, values: Mapping[str, Any]) -> ImageRef:
    if not table.is_path(name):
        return table.image(position, name, f"{source} {name}")
    try:
        found = parse_image(values[name], table.folder(position))
    except BadValue as error:
        raise BadValue(f"{name!r}: {error}") from None
    if isinstance(found, Path):
        return ImageRef(path=found, source=f"{source} {name}")
    return table.image(position, name, f"{source} {name}")


def _name(source: str) -> str:
    """`/data/pairs.parquet:17` -> `pairs.parquet:17`: ids do not depend on where the data lies."""
    return source.replace("\\", "/").rpartition("/")[2]
