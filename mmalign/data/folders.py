"""Two folders of images with equal file names: the winner in one, the loser in the other.

pairs/w/fox.png   pairs/l/fox.png   pairs/w/fox.txt        (the prompt beside the winner), or
pairs/prompts.jsonl with {"name": "fox", "prompt": "a red fox"}; CSV and TSV with the same columns work too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mmalign.data.fields import BadRow, Columns, RowBuilder
from mmalign.data.jsonl import read_objects
from mmalign.types import DataError, ImageRef, Row

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
PROMPT_FILES = ("prompts.jsonl", "prompts.csv", "prompts.tsv")
NAME_COLUMNS = ("name", "id", "stem", "file", "file_name", "image")
PROMPT_COLUMNS = ("prompt", "caption", "text")


def read_folders(
    path: str,
    *,
    chosen_folder: str = "w",
    rejected_folder: str | None = "l",
    prompts: str | None = None,
    allow_empty_prompt: bool = False,
) -> Iterator[Row | BadRow]:
    """Pairs of images with the same name (below the folder, without suffix) in two folders.

    The prompt comes from `prompts`, else from `prompts.jsonl`, `.csv` or `.tsv` in the folder, else from a `.txt` file
    beside either image.

    Args:
        chosen_folder, rejected_folder: sub-folders. `rejected_folder: null` reads unpaired rows.
        prompts: JSONL, CSV or TSV file with the columns `name` and `prompt`; relative to `path`.
        allow_empty_prompt: accept empty captions.
    """
    root = Path(path).expanduser()
    chosen_root = _existing(root, chosen_folder)
    rejected_root = None if rejected_folder is None else _existing(root, rejected_folder)
    table = _prompt_table(root, prompts)
    builder = RowBuilder(Columns(), allow_empty_prompt)
    bad: list[BadRow] = []
    chosen = _images_by_name(chosen_root, bad)
    rejected = chosen if rejected_root is None else _images_by_name(rejected_root, bad)
    yield from bad
    for name in sorted(chosen.keys() | rejected.keys()):
        source = f"{root}:{name}"
        if name not in chosen or name not in rejected:
            there, absent = (chosen_root, rejected_root) if name in chosen else (rejected_root, chosen_root)
            yield BadRow(source, f"{there}/{name} has no partner in {absent}; add it or remove the image")
            continue
        prompt = table.get(name) if table is not None else _sidecar(root, name, chosen[name], rejected[name])
        if isinstance(prompt, BadRow):
            yield prompt
            continue
        if prompt is None:
            where = "the prompts file" if table is not None else f"{chosen[name].with_suffix('.txt')}"
            yield BadRow(source, f"no prompt for {name!r}: expected in {where}")
            continue
        yield builder.build(
            {"prompt": prompt},
            source=source,
            chosen=ImageRef(path=chosen[name], source=str(chosen[name])),
            rejected=None if rejected_root is None else ImageRef(path=rejected[name], source=str(rejected[name])),
            identity=name,
        )


def _existing(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise DataError(
            f"{root}: no folder {name!r}; folders there: {', '.join(there) or 'none'}; "
            f"name yours with data.options.chosen_folder and data.options.rejected_folder"
        )
    return folder


def _images_by_name(folder: Path, bad: list[BadRow]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if path.suffix.lower() == ".txt":
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            bad.append(BadRow(str(path), f"not an image by its suffix; allowed: {', '.join(IMAGE_SUFFIXES)}"))
            continue
        name = relative.with_suffix("").as_posix()
        if name in found:
            bad.append(BadRow(str(path), f"has the same name as {found[name].name}; which one is meant?"))
            continue
        found[name] = path
    return found


def _sidecar(root: Path, name: str, chosen: Path, rejected: Path) -> str | BadRow | None:
    texts: dict[str, str] = {}
    for path in dict.fromkeys((chosen.with_suffix(".txt"), rejected.with_suffix(".txt"), root / f"{name}.txt")):
        if path.is_file():
            try:
                texts[str(path)] = path.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                return BadRow(str(path), f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
    if len(set(texts.values())) > 1:
        return BadRow(f"{root}:{name}", f"the prompt files disagree: {texts}; both images need the same prompt")
    return next(iter(texts.values()), None)


def _prompt_table(root: Path, prompts: str | None) -> dict[str, str] | None:
    """name -> prompt, or None when there is no such file."""
    if prompts is not None:
        file = root / Path(prompts).expanduser()
        if not file.is_file():
            raise DataError(f"prompts file {str(file)!r} does not exist; set data.options.prompts")
    else:
        existing = [root / name for name in PROMPT_FILES if (root / name).is_file()]
        if len(existing) > 1:
            listed = ", ".join(p.name for p in existing)
            raise DataError(f"{root}: several prompt files ({listed}); choose one with data.options.prompts")
        if not existing:
            return None
        file = existing[0]
    table: dict[str, str] = {}
    for source, record in _records(file):
        name = _pick(record, NAME_COLUMNS, source)
        prompt = _pick(record, PROMPT_COLUMNS, source)
        key = Path(name)
        stem = key.with_suffix("").as_posix() if key.suffix.lower() in IMAGE_SUFFIXES else key.as_posix()
        if stem in table and table[stem] != prompt:
            raise DataError(f"{source}: a second prompt for {stem!r}; each name needs exactly one")
        table[stem] = prompt
    return table


def _records(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        for line, _, values in read_objects(file):
            if isinstance(values, BadRow):
                raise DataError(str(values))
            yield f"{file}:{line}", dict(values)
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
            for record in reader:
                yield f"{file}:{reader.line_num}", dict(record)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file}: not valid CSV: {error}") from None


def _pick(record: dict[str, object], names: tuple[str, ...], source: str) -> str:
    for name in names:
        value = record.get(name)
        if value is not None:
            if not isinstance(value, (str, int)):
                raise DataError(f"{source}: {name!r} is {value!r}; it must be text")
            return str(value)
    raise DataError(f"{source}: needs one of the columns {', '.join(names)}; found {', '.join(map(str, record))}")
