"""Questions to evaluate a language model on: images and a prompt, and what is true about them in the other columns."""

from __future__ import annotations

from mmalign.data.fields import BadRow
from mmalign.data.records import open_records, text_rows
from mmalign.data.texts import TextColumns
from mmalign.registry import nearest
from mmalign.types import DataError, ImageRef, Row

SCENES = {"builtin:scenes_dev": "dev", "builtin:scenes_heldout": "heldout"}
NUM_SCENES = 64
SCENES_SEED = 0


def read_questions(spec: str, limit: int | None = None) -> list[Row]:
    """The questions of `spec`: rows without responses; every other column is kept for rewards.

    Args:
        spec: JSONL, JSON, Parquet or Arrow file (or a hub id) with `prompt` or `messages`, and `image` or `images`
            where a question shows any; or `builtin:scenes_dev`, `builtin:scenes_heldout`: captions to write for scenes
            of the synthetic world.
        limit: only the first N; of the built-in scenes any number (default 64).

    Raises `DataError` on the first question that cannot be used, naming file and index, and when there is none.
    """
    if spec.startswith("builtin:"):
        return _scenes(spec, NUM_SCENES if limit is None else limit)
    names = TextColumns(rejected=None)
    rows: list[Row] = []
    for row in text_rows(open_records(spec, names), names, with_responses=False):
        if limit is not None and len(rows) == limit:
            break
        if isinstance(row, BadRow):
            raise DataError(str(row))
        rows.append(row)
    if not rows:
        raise DataError(f"{spec} holds no question")
    return rows


def _scenes(spec: str, num: int) -> list[Row]:
    from PIL import Image

    from mmalign.synthetic.questions import evaluation_questions

    if spec not in SCENES:
        raise DataError(f"no bundled questions {spec!r}{nearest(spec, SCENES)}. Bundled: {', '.join(SCENES)}")
    split = SCENES[spec]
    rows = []
    for index, question in enumerate(evaluation_questions(split, num, SCENES_SEED)):  # type: ignore[arg-type]
        source = f"{spec}:{index}"
        images = tuple(ImageRef.from_pil(Image.fromarray(pixels), source) for pixels in question.images)
        columns = {"truth": question.truth, "kind": question.kind}
        rows.append(Row(question.id, question.prompt, source=source, columns=columns, images=images))
    return rows
