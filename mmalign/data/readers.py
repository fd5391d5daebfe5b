"""The readers by name, and `auto`: which reader a path wants.

See `mmalign.data` for what a reader is and how to add one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmalign.data.columns import read_hub, read_parquet
from mmalign.data.fields import BadRow, Dropped
from mmalign.data.folders import read_folders
from mmalign.data.jsonl import read_jsonl, read_objects
from mmalign.data.pickapic import read_pickapic
from mmalign.data.preferences import read_mdpo, read_rlhf_v, read_trl
from mmalign.data.prompts import read_prompts
from mmalign.data.records import read_list
from mmalign.data.synthetic import ANSWERS_PATH, PATH
from mmalign.data.tables import is_saved_dataset
from mmalign.registry import nearest
from mmalign.types import DataError

__all__ = [
    "BadRow",
    "Dropped",
    "detect_format",
    "read_folders",
    "read_hub",
    "read_jsonl",
    "read_mdpo",
    "read_parquet",
    "read_pickapic",
    "read_prompts",
    "read_rlhf_v",
    "read_trl",
]

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
HUB_NAMES = {
    "pickapic": "pickapic",
    "rlhf-v-dataset": "rlhf_v",
    "rlaif-v-dataset": "rlhf_v",
    "mdpo-preference-data": "mdpo",
}
PICKAPIC_COLUMNS = {"caption", "jpg_0", "jpg_1", "label_0", "label_1"}
PROMPT_SUFFIXES = (".txt", ".tsv")
DRAWN = {PATH: "synthetic", ANSWERS_PATH: "synthetic_answers"}
READABLE = ".jsonl, .json, .parquet and .arrow files, prompt lists (.txt, .tsv)"


def locate(path: str) -> str:
    """`path`, or the folder behind `builtin:NAME` where a data set of files is bundled under that name.

    Raises `DataError` with the bundled names for one that is not among them.
    """
    from mmalign.builtin import PREFIX, builtin_path, bundled_data

    if not path.startswith(PREFIX) or path in DRAWN:
        return path
    known = [*DRAWN, *bundled_data()]
    if path not in known:
        raise DataError(f"no bundled data set {path!r}{nearest(path, known)}. Bundled: {', '.join(known)}")
    found = builtin_path(path)
    return str(found) if found.is_dir() else path


def detect_format(path: str) -> str:
    """The reader that fits `path`. Raises `DataError` saying what was looked for when that cannot be told."""
    path = locate(path)
    if path.startswith("builtin:"):
        return DRAWN.get(path, "prompts")
    local = Path(path).expanduser()
    if local.is_file():
        return _detect_file(local)
    if local.is_dir():
        return _detect_folder(local)
    if HUB_ID.match(path) and not path.startswith("."):
        return next((reader for part, reader in HUB_NAMES.items() if part in path.lower()), "hub")
    raise DataError(
        f"data.path {path!r} does not exist (relative paths start at {Path.cwd()}) and is not a hub id (owner/name)"
    )


def _detect_file(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _detect_jsonl(file)
    if suffix == ".json":
        first: dict[str, Any] = next((values for values in read_list(file) if isinstance(values, dict)), {})
        return _detect_texts(first) or ("prompts" if _holds_only_prompts(first) else "trl")
    if suffix == ".parquet":
        return _detect_parquet(file)
    if suffix == ".arrow":
        return "hub"
    if suffix in PROMPT_SUFFIXES:
        return "prompts"
    raise DataError(
        f"data.path {str(file)!r}: cannot tell the format of a {suffix or 'suffix-less'} file; readable are {READABLE} "
        f"and folders; set data.format if it is one of those in disguise"
    )


def _detect_jsonl(file: Path) -> str:
    lines = (dict(values) for _, _, values in read_objects(file) if not isinstance(values, BadRow))
    first: dict[str, Any] = next(lines, {})
    return _detect_texts(first) or ("prompts" if _holds_only_prompts(first) else "jsonl")


def _detect_texts(names: Collection[str]) -> str | None:
    """The published format of text answers with these columns, if it is one."""
    if {"img_path", "prompt", "chosen", "rejected"} <= set(names):
        return "mdpo"
    if {"question", "chosen", "rejected"} <= set(names) and {"image", "image_path"} & set(names):
        return "rlhf_v"
    if {"text", "origin_dataset"} <= set(names) and {"image", "image_path"} & set(names):
        return "rlhf_v"
    return None


def _holds_only_prompts(names: Collection[str]) -> bool:
    """A prompt and nothing that is, or is meant to be, a response or an image."""
    from mmalign.evaluation.prompts import PROMPT_COLUMNS

    known = [str(name).lower() for name in names]
    taken = ("chosen", "rejected", "image", "images", "messages")
    return any(name in known for name in PROMPT_COLUMNS) and not any(
        difflib.get_close_matches(name, known, n=1, cutoff=0.7) for name in taken
    )


def _detect_folder(folder: Path) -> str:
    if is_saved_dataset(folder):
        return _detect_saved(folder)
    jsonl = [path for path in sorted(folder.glob("*.jsonl")) if path.name != "prompts.jsonl"]
    parquet = sorted(folder.rglob("*.parquet"))
    lists = sorted(folder.glob("*.json")) if not jsonl and not parquet else []
    candidates = {
        "folders (w/ and l/)": "folders" if (folder / "w").is_dir() and (folder / "l").is_dir() else None,
        "jsonl (one .jsonl file)": _detect_jsonl(jsonl[0]) if jsonl else None,
        "json (one .json file)": _detect_file(lists[0]) if len(lists) == 1 else None,
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
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    return "pickapic" if set(names) >= PICKAPIC_COLUMNS else _detect_texts(names) or "parquet"


def _detect_saved(folder: Path) -> str:
    import json

    infos = sorted(folder.rglob("dataset_info.json"))
    try:
        features = json.loads(infos[0].read_text(encoding="utf-8")).get("features") or {} if infos else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{infos[0]}: not readable: {error}; write the dataset again with save_to_disk") from None
    return "pickapic" if set(features) >= PICKAPIC_COLUMNS else _detect_texts(features) or "hub"
