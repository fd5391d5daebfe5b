"""Pick-a-Pic v1 and v2 as published: two JPEGs and labels per row, 1/0, 0/1 or 0.5/0.5 for a tie.

Ties are dropped unless asked for (the paper trains on the 851 293 pairs with a clear label; the diffusers scripts treat
ties as wins of the first image, which we do not). Rows never labelled (`has_label` false) are always dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mmalign.data.fields import BadRow, BadValueError, Columns, Dropped, RowBuilder, digest_of
from mmalign.data.tables import (
    ParquetTable,
    Table,
    check_columns,
    check_light,
    is_saved_dataset,
    open_dataset,
    parquet_files,
)
from mmalign.types import ImageRef, Row

Ties = Literal["drop", "soft"]
NEEDED = ("caption", "label_0", "label_1")
OPTIONAL = ("has_label", "best_image_uid", "image_0_uid", "image_1_uid", "ranking_id", "model_0", "model_1")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_pickapic(
    path: str,
    *,
    ties: Literal["drop", "soft"] = "drop",
    split: str | None = None,
    images: str | None = None,
    revision: str | None = None,
    columns: list[str] | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow | Dropped]:
    """Pick-a-Pic rows from Parquet files, a folder written by `save_to_disk`, or a hub id.

    Args:
        ties: `drop` leaves out rows labelled 0.5/0.5; `soft` keeps them with preference 0.5.
        split: default: `train`, for Parquet files the only split there is.
        images: folder of image files named by uid, for the variant without images.
        revision: branch, tag or commit on the hub.
        columns: further columns to keep for rewards. Default: model_0, model_1 and the ids.
        allow_empty_prompt: accept empty captions.
    """
    local = Path(path).expanduser()
    table: Table
    if local.exists() and not is_saved_dataset(local):
        table = ParquetTable(path, parquet_files(local, split))
    else:
        table = open_dataset(path, split=split or "train", revision=revision)
    return _read(table, ties, None if images is None else Path(images).expanduser(), columns, allow_empty_prompt)


def _read(
    table: Table, ties: Ties, images: Path | None, columns: list[str] | None, allow_empty_prompt: bool
) -> Iterator[Row | BadRow | Dropped]:
    hint = ". For the variant without images, give their folder with data.options.images"
    if images is None:
        check_columns(table, (*NEEDED, "jpg_0", "jpg_1"), hint)
    else:
        check_columns(table, (*NEEDED, "image_0_uid", "image_1_uid"))
    check_columns(table, columns or ())
    check_light(table, columns or ())
    present = [name for name in (*OPTIONAL, *(columns or ())) if name in table.column_names]
    keep = [name for name in OPTIONAL[1:] if name in present] if columns is None else columns
    builder = RowBuilder(Columns(prompt="caption", id="\0 no id column"), allow_empty_prompt)
    for position, source, values in table.rows(list(dict.fromkeys([*NEEDED, *present]))):
        if values.get("has_label") is False:
            yield Dropped(source, "unlabelled_dropped")
            continue
        try:
            label = _label(values)
            pair = [_image(table, position, side, source, values, images) for side in (0, 1)]
        except BadValueError as error:
            yield BadRow(source, str(error))
            continue
        if label == 0.5 and ties == "drop":
            yield Dropped(source, "ties_dropped")
            continue
        chosen, rejected = pair if label >= 0.5 else reversed(pair)
        yield builder.build(
            values,
            source=source,
            chosen=chosen,
            rejected=rejected,
            preference=max(label, 1.0 - label),
            identity=_identity(values, source),
            extra=keep,
        )


def _label(values: Mapping[str, Any]) -> float:
    """Preference for image 0: 1, 0 or 0.5."""
    first, second = values["label_0"], values["label_1"]
    if (first, second) not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise BadValueError(f"labels {first!r}/{second!r} must be 1/0, 0/1 or 0.5/0.5")
    uids = (values.get("image_0_uid"), values.get("image_1_uid"))
    if None not in uids and uids[0] == uids[1]:
        raise BadValueError(f"both images have the uid {uids[0]!r}: nothing to prefer; remove the row")
    best = values.get("best_image_uid")
    if best is not None and best in uids and first != 0.5 and uids.index(best) != (0 if first == 1 else 1):
        raise BadValueError(f"labels {first}/{second} contradict best_image_uid {best!r}")
    return float(first)


def _image(
    table: Table, position: Any, side: int, source: str, values: Mapping[str, Any], images: Path | None
) -> ImageRef:
    if images is None:
        return table.image(position, f"jpg_{side}", f"{source} jpg_{side}")
    uid = values[f"image_{side}_uid"]
    for suffix in SUFFIXES:
        path = images / f"{uid}{suffix}"
        if path.is_file():
            return ImageRef(path=path, source=f"{source} {path}")
    raise BadValueError(f"no image file {uid}{{{','.join(SUFFIXES)}}} in {images}")


def _identity(values: Mapping[str, Any], source: str) -> str:
    uids = [values.get(name) for name in ("image_0_uid", "image_1_uid", "ranking_id")]
    if uids[0] is None or uids[1] is None:
        return digest_of(values["caption"], source.replace("\\", "/").rpartition("/")[2])
    return digest_of(*uids)
