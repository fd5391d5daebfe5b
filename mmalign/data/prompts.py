"""Prompts alone: what online methods sample from. The other columns of a prompt go to the rewards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmalign.data.fields import BadRow, BadValueError, Columns, RowBuilder, digest_of
from mmalign.data.records import JSONL_SUFFIXES, json_records
from mmalign.types import Row


def read_prompts(path: str, *, columns: list[str] | None = None) -> Iterator[Row | BadRow]:
    """Rows of a prompt list: text (a prompt a line), JSONL, JSON, TSV or CSV with a column prompt, caption or text, or
    `builtin:attributes_train`, `…_dev`, `…_heldout`.

    Args:
        columns: further columns to keep for rewards. Default: all.
    """
    from mmalign.evaluation.prompts import PromptRow, prompt_row, read_prompt_rows

    def lines(file: Path) -> Iterator[tuple[str, PromptRow | BadRow]]:
        """A line at a time, so that a bad one costs no other."""
        for record in json_records(file, None):
            try:
                yield record.source, record if isinstance(record, BadRow) else prompt_row(record.values, record.source)
            except ValueError as error:
                yield record.source, BadRow(record.source, str(error).removeprefix(f"{record.source}: "))

    builder = RowBuilder(Columns(id="id"))
    file = Path(path).expanduser()
    found: Iterator[tuple[str, PromptRow | BadRow]]
    if file.suffix.lower() in JSONL_SUFFIXES and file.is_file():
        found = lines(file)
    else:
        found = ((f"{path}:{index}", row) for index, row in enumerate(read_prompt_rows(path)))
    for source, prompt in found:
        if isinstance(prompt, BadRow):
            yield prompt
            continue
        names = [name for name in prompt.columns if name != "id"] if columns is None else columns
        try:
            row_id = builder.row_id(prompt.columns, digest_of(prompt.prompt))
        except BadValueError as error:
            yield BadRow(source, str(error))
            continue
        kept = {name: prompt.columns[name] for name in names if name in prompt.columns}
        yield Row(id=row_id, prompt=prompt.prompt, source=source, columns=kept)
