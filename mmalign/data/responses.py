"""Are the responses of a data set images or texts? Told by what its first rows hold, and an error where that is unclear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from mmalign.data.fields import BASE64_STARTS, MAX_PATH_CHARS, MIN_BASE64_CHARS
from mmalign.data.folders import IMAGE_SUFFIXES
from mmalign.data.tables import Table
from mmalign.data.texts import TextColumns
from mmalign.types import DataError

Kind = Literal["image", "text"]
NUM_LOOKED_AT = 100


def kind_of_table(table: Table, columns: TextColumns) -> Kind:
    """By the type of the column `chosen`, and by its values where it holds text. Raises `DataError` when unclear."""
    if columns.chosen not in table.column_names or not table.is_light(columns.chosen):
        return "image"
    names = {columns.chosen, columns.prompt, columns.messages, *columns.images}
    light = [name for name in table.column_names if name in names and table.is_light(name)]
    counted = [name for name in table.column_names if name in columns.images and not table.is_light(name)]
    rows = ((source, values, table.folder(position)) for position, source, values in table.rows(light, counted))
    return kind_of_rows(rows, columns)


def kind_of_rows(rows: Iterable[tuple[str, Mapping[str, Any], Path]], columns: TextColumns) -> Kind:
    """By the first row that tells; `image` when none does.

    Args:
        rows: (source, values, folder that image paths start at).

    Raises `DataError` when a row shows images beside its prompt and its response may be a text or an image.
    """
    for number, (source, values, folder) in enumerate(rows):
        chosen = values.get(columns.chosen)
        if isinstance(chosen, (list, Mapping)):
            return "text" if _is_message(chosen) else "image"
        if isinstance(chosen, str) and chosen.strip():
            named_image = names_image(chosen, folder)
            if not named_image:
                return "text"
            if not _shows_images(values, columns):
                return "image"
            raise DataError(
                f"{source}: the row shows images beside its prompt, and {columns.chosen!r} ({chosen[:80]!r}) looks like "
                f"an image too: set data.options.responses to text or image"
            )
        if number >= NUM_LOOKED_AT:
            break
    return "image"


def names_image(text: str, folder: Path) -> bool:
    """Whether a text is an image: a data URI, base64, an existing file, or a name with an image suffix."""
    if text.startswith("data:image/") or (len(text) >= MIN_BASE64_CHARS and text.startswith(BASE64_STARTS)):
        return " " not in text
    if text.lower().endswith(IMAGE_SUFFIXES) and not any(letter.isspace() for letter in text):
        return True
    if len(text) > MAX_PATH_CHARS or "\0" in text or "\n" in text:
        return False
    try:
        return (folder / text).is_file()
    except OSError:
        return False  # Too long for a file name.


def _is_message(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and "role" in first


def _shows_images(values: Mapping[str, Any], columns: TextColumns) -> bool:
    if isinstance(values.get(columns.prompt), list) or values.get(columns.messages) is not None:
        return True
    return any(bool(values.get(name)) for name in columns.images)
