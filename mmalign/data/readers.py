"""The readers by name, and `auto`: which reader a path wants.

See `mmalign.data` for what a reader is and how to add one.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmalign.data.columns import read_hub, read_parquet
from mmalign.data.fields import BadRow, Dropped
from mmalign.data.folders import read_folders
from mmalign.data.jsonl import read_jsonl
from mmalign.data.pickapic import read_pickapic
from mmalign.data.synthetic import ANSWERS_PATH
from mmalign.data.tables import is_saved_dataset
from mmalign.types import DataError

__all__ = [
    "BadRow",
    "Dropped",
    "detect_format",
    "read_folders",
    "read_hub",
    "read_jsonl",
    "read_parquet",
    "read_pickapic",
]

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
PICKAPIC_COLUMNS = {"caption", "jpg_0", "jpg_1", "label_0", "label_1"}


def detect_format(path: str) -> str:
    """The reader that fits `path`. Raises `DataError` saying what was looked for when that cannot be told."""
    if path.startswith("builtin:"):
        return "synthetic_answers" if path == ANSWERS_PATH else "synthetic"
    local = Path(path).expanduser()
    if local.is_file():
        return _detect_file(local)
    if local.is_dir():
        return _detect_folder(local)
    if HUB_ID.match(path) and not path.startswith("."):
        return "pickapic" if "pickapic" in path.lower() else "hub"
    raise DataError(
        f"data.path {path!r} does not exist (relative paths start at {Path.cwd()}) and is not a hub id (owner/name)"
    )


def _detect_file(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".parquet":
        return _detect_parquet(file)
    if suffix == ".arrow":
        return "hub"
    raise DataError(
        f"data.path {str(file)!r}: cannot tell the format of a {suffix or 'suffix-less'} file; readable are .jsonl, "
        f".parquet and .arrow files and folders; set data.format if it is one of those in disguise"
    )


def _detect_folder(folder: Path) -> str:
    if is_saved_dataset(folder):
        return _detect_saved(folder)
    jsonl, parquet = sorted(folder.glob("*.jsonl")), sorted(folder.rglob("*.parquet"))
    candidates = {
        "folders (w/ and l/)": "folders" if (folder / "w").is_dir() and (folder / "l").is_dir() else None,
        "jsonl (one .jsonl file)": "jsonl" if [p for p in jsonl if p.name != "prompts.jsonl"] else None,
        "parquet (.parquet files)": _detect_parquet(parquet[0]) if parquet else None,
    }
    found = {label: name for label, name in candidates.items() if name is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    problem = f"fits several: {', '.join(found)}" if found else f"fits none of: {', '.join(candidates)}"
    raise DataError(
        f"data.path {str(folder)!r}: cannot tell the format; the folder (with {there}) {problem}. Set data.format"
    )


def _detect_parquet(file: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    return "pickapic" if names >= PICKAPIC_COLUMNS else "parquet"


def _detect_saved(folder: Path) -> str:
    import json

    infos = sorted(folder.rglob("dataset_info.json"))
    try:
        features = json.loads(infos[0].read_text(encoding="utf-8")).get("features") or {} if infos else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{infos[0]}: not readable: {error}; write the dataset again with save_to_disk") from None
    return "pickapic" if set(features) >= PICKAPIC_COLUMNS else "hub"
