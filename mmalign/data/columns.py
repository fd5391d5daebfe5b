"""Readers of tables whose columns the config names: Parquet files and Hugging Face datasets, of image or text pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mmalign.data.fields import NUMBERS, BadRow, BadValueError, Columns, RowBuilder, digest_of, parse_image
from mmalign.data.records import table_records, text_rows
from mmalign.data.responses import kind_of_table
from mmalign.data.tables import ParquetTable, Table, check_columns, check_light, open_dataset, parquet_files
from mmalign.data.texts import text_columns_of
from mmalign.types import ImageRef, Row


def read_parquet(
    path: str,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str | None = "rejected",
    id_column: str = "id",
    split: str | None = None,
    images_column: str | None = None,
    responses: Literal["auto", "image", "text"] = "auto",
    columns: list[str] | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file or of all Parquet files below a folder.

    Images are bytes, {"bytes", "path"} records, or paths relative to the Parquet file. `preference`, `margin`,
    `score_chosen` and `score_rejected` are read where present.

    Args:
        prompt_column, chosen_column, rejected_column, id_column: column names. `rejected_column: null`: unpaired rows.
        split: part of the file names before `-00000-of-00010`; needed where a folder holds several.
        images_column: images that a prompt shows. Default: `images` or `image`.
        responses: whether chosen and rejected are images or texts. Default: told by the columns and the first rows.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
        allow_empty_prompt: accept empty captions.
    """
    table = ParquetTable(path, parquet_files(Path(path).expanduser(), split))
    kept = None if columns is None else tuple(columns)
    texts = text_columns_of(prompt_column, chosen_column, rejected_column, id_column, images_column, kept)
    if (kind_of_table(table, texts) if responses == "auto" else responses) == "text":
        needed = [name for name in (chosen_column, rejected_column) if name is not None]
        return text_rows(table_records(table, texts, needed), texts, allow_empty_prompt=allow_empty_prompt)
    names = Columns(prompt_column, chosen_column, rejected_column, id_column, kept)
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
    images_column: str | None = None,
    responses: Literal["auto", "image", "text"] = "auto",
    columns: list[str] | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Rows of a Hugging Face dataset: hub id, folder written by `save_to_disk`, or local data that `datasets` loads.

    Args:
        split: e.g. `train`, `validation`, `train[:1000]`.
        name: configuration (subset) of the dataset.
        revision: branch, tag or commit on the hub.
        prompt_column, chosen_column, rejected_column, id_column: column names. `rejected_column: null`: unpaired rows.
        images_column: images that a prompt shows. Default: `images` or `image`.
        responses: whether chosen and rejected are images or texts. Default: told by the columns and the first rows.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
        allow_empty_prompt: accept empty captions.
    """
    table = open_dataset(path, split=split, name=name, revision=revision)
    kept = None if columns is None else tuple(columns)
    texts = text_columns_of(prompt_column, chosen_column, rejected_column, id_column, images_column, kept)
    if (kind_of_table(table, texts) if responses == "auto" else responses) == "text":
        needed = [name for name in (chosen_column, rejected_column) if name is not None]
        return text_rows(table_records(table, texts, needed), texts, allow_empty_prompt=allow_empty_prompt)
    names = Columns(prompt_column, chosen_column, rejected_column, id_column, kept)
    return _read_pairs(table, names, allow_empty_prompt)


def _read_pairs(table: Table, names: Columns, allow_empty_prompt: bool) -> Iterator[Row | BadRow]:
    looks_like_pickapic = {"jpg_0", "jpg_1", "label_0"} <= set(table.column_names)
    hint = ". This is the Pick-a-Pic schema: set data.format: pickapic" if looks_like_pickapic else ""
    check_columns(table, [names.prompt, *names.images(), *(names.keep or ())], hint)
    check_light(table, names.keep or ())
    image_columns = names.images()
    extra = [name for name in names.extra(table.column_names) if table.is_light(name)]
    by_path = [name for name in image_columns if table.is_path(name)]
    numbers = [name for name in (*NUMBERS, names.id) if name in table.column_names]
    builder = RowBuilder(names, allow_empty_prompt)
    for position, source, values in table.rows(list(dict.fromkeys([names.prompt, *numbers, *extra, *by_path]))):
        try:
            images = {name: _cell(table, position, name, source, values) for name in image_columns}
        except BadValueError as error:
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
    except BadValueError as error:
        raise BadValueError(f"{name!r}: {error}") from None
    if isinstance(found, Path):
        return ImageRef(path=found, source=f"{source} {name}")
    return table.image(position, name, f"{source} {name}")


def _name(source: str) -> str:
    """`/data/pairs.parquet:17` -> `pairs.parquet:17`: ids do not depend on where the data lies."""
    return source.replace("\\", "/").rpartition("/")[2]
