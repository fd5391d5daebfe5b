"""`mmalign score`: a reward over a folder of images, a JSONL file or preference pairs; one JSON line per image or answer.

    {"id": …, "path": …, "prompt": …, "score": 0.27, "sub_scores": {…}, "error": null, "reward": "clip",
     "fingerprint": …}

Preference pairs give two lines per row, with `side` chosen and rejected; lines of pairs of texts also hold the
`response`. What cannot be read or scored keeps its line, with `score` null and the reason in `error`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmalign.conformance import check_reward
from mmalign.reward import RewardError, Scorer, load_reward
from mmalign.reward_catalog import list_rewards, new_reward
from mmalign.types import DataError, ImageRef, Row

if TYPE_CHECKING:
    from rich.console import Console

    from mmalign.config import RewardConfig

__all__ = ["Item", "check_reward", "list_rewards", "new_reward", "read_items", "score_data"]

DEFAULT_BATCH_SIZE = 16
IMAGE_FIELDS = ("image", "path", "file_name", "image_path", "file")
PROMPT_FIELDS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Item:
    """One image to score, or one answer (`response`) about the images `shown`. Both are None where the row is bad;
    `error` then says why."""

    id: str
    path: str | None
    prompt: str
    image: ImageRef | None
    columns: Mapping[str, Any] = field(default_factory=dict)
    side: str | None = None
    error: str | None = None
    response: str | None = None
    shown: tuple[ImageRef, ...] = ()


@dataclass
class _Tally:
    """What the closing line says."""

    scores: list[float] = field(default_factory=list)
    num_items: int = 0
    sides: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, item: Item, score: float) -> None:
        self.num_items += 1
        if math.isnan(score):
            return
        self.scores.append(score)
        if item.side is not None:
            self.sides.setdefault(item.id, {})[item.side] = score

    def line(self, scorer: Scorer) -> str:
        text = f"{scorer.name}: {len(self.scores)} of {self.num_items} {scorer.unit}s scored"
        if self.scores:
            mean = math.fsum(self.scores) / len(self.scores)
            text += f", mean {mean:.4g} ({min(self.scores):.4g} … {max(self.scores):.4g})"
        pairs = [pair for pair in self.sides.values() if len(pair) == 2]
        if pairs:
            sign = 1.0 if scorer.higher_is_better else -1.0
            gaps = [sign * (pair["chosen"] - pair["rejected"]) for pair in pairs]
            wins = sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)
            text += f"; chosen beats rejected in {100 * wins:.1f} % of {len(pairs)} pairs (ties count half)"
        return text


def score_data(
    reward: RewardConfig | Scorer | str,
    data: str | Path,
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    format: str = "auto",
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    stream: IO[str] | None = None,
    console: Console | None = None,
) -> int:
    """Score every image of `data` and write one JSON line each. 0: all have a score; 1: some have none.

    Args:
        reward: name (or `file.py:Name`), name with options, or a loaded scorer.
        data: an image or a folder of images (prompts from `.txt` files beside them, if any), JSONL with `image` and
            `prompt`, or anything that the data readers take as preference pairs.
        out: file, written under another name and renamed when complete. None: `stream`.
        format, options: reader and its options, as in the config's `data` section.
        limit: score only the first images.
        batch_size: images decoded and scored at a time. Default: the reward's own, else 16.
        stream: where lines go without `out`. Default: stdout.
        console: where the closing line goes. Default: stderr.

    Raises `ValueError` (`RewardError`, `DataError`) when the reward is broken, needs prompts that the data does not
    have, or the data cannot be read at all.
    """
    from rich.console import Console

    from mmalign.data.load import map_threaded

    console = console or Console(stderr=True)
    scorer = reward if isinstance(reward, Scorer) else load_reward(reward, device)
    items = read_items(data, format=format, options=options)
    _require_prompts(scorer, data, format, console)
    batch_size = batch_size or scorer.batch_size or DEFAULT_BATCH_SIZE
    tally = _Tally()
    with _output(out, stream or sys.stdout) as lines:
        opened = map_threaded(_open, itertools.islice(items, limit), ahead=2 * batch_size)
        for batch in _batches(opened, batch_size):
            _require_unit(scorer, [item for item, _, _ in batch], data)
            for item, record, score in _score_batch(scorer, batch):
                lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                tally.add(item, score)
            lines.flush()
        if tally.num_items == 0:
            raise DataError(f"{data}: no {scorer.unit}s to score")
    console.print(tally.line(scorer), markup=False, highlight=False, soft_wrap=True)
    return 0 if len(tally.scores) == tally.num_items else 1


def read_items(data: str | Path, *, format: str = "auto", options: Mapping[str, Any] | None = None) -> Iterator[Item]:
    """One image, the images of a folder, a JSONL file of images, or both sides of preference pairs."""
    path = Path(data).expanduser()
    if format == "auto" and not options:
        if _is_image(path):
            return iter([_file_item(path, path.parent)])
        if _is_image_folder(path):
            return _folder_items(path)
        table = _image_jsonl(path)
        if table is not None:
            return _jsonl_items(table)
    return _pair_items(str(data), format, dict(options or {}))


def _require_prompts(scorer: Scorer, data: str | Path, format: str, console: Console) -> None:
    """A reward that reads prompts must not score a folder of bare images with empty ones unnoticed."""
    path = Path(data).expanduser()
    if not scorer.takes_prompts or scorer.declares_prompt is False or format != "auto":
        return
    if not (_is_image(path) or _is_image_folder(path)) or any(item.prompt for item in read_items(path)):
        return
    fix = 'put each prompt into a .txt file beside its image, or give JSONL lines {"image": …, "prompt": …}'
    if scorer.needs_prompt:
        raise RewardError(f"reward {scorer.name!r} needs prompts, and {path} has none; {fix}", "invalid")
    console.print(
        f"{path} has no prompts: reward {scorer.name!r} gets empty ones. Declare `needs_prompt = False` on it if it "
        f"ignores them, `needs_prompt = True` to make this an error; or {fix}",
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _require_unit(scorer: Scorer, items: Sequence[Item], data: str | Path) -> None:
    """A reward of images cannot score answers, nor the other way round."""
    for item in items:
        held = "answer" if item.response is not None else "image" if item.image is not None else scorer.unit
        if held != scorer.unit:
            raise RewardError(
                f"reward {scorer.name!r} scores {scorer.unit}s, and {data} holds {held}s; give data with {scorer.unit}s, "
                f"or a reward of {held}s",
                "invalid",
            )


def _is_image(path: Path) -> bool:
    from mmalign.data.folders import IMAGE_SUFFIXES

    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _images_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if _is_image(path))


def _is_image_folder(path: Path) -> bool:
    """Holds images and is none of the data formats: no JSONL that lists them, no Parquet, no `w/` and `l/`."""
    if not path.is_dir() or _image_jsonl(path) is not None:
        return False
    if any(True for _ in _images_in(path)):
        return True
    from mmalign.data.tables import is_saved_dataset

    pairs = (path / "w").is_dir() and (path / "l").is_dir()
    tables = any(True for _ in path.glob("*.jsonl")) or any(True for _ in path.rglob("*.parquet"))
    below = (image for folder in _folders_below(path) for image in _images_in(folder))
    return not pairs and not tables and not is_saved_dataset(path) and any(True for _ in below)


def _folder_items(folder: Path) -> Iterator[Item]:
    for path in sorted(p for below in [folder, *_folders_below(folder)] for p in _images_in(below)):
        yield _file_item(path, folder)


def _file_item(path: Path, folder: Path) -> Item:
    """An image file with the prompt from the `.txt` file beside it, empty where there is none."""
    sidecar = path.with_suffix(".txt")
    row_id, where = path.relative_to(folder).as_posix(), str(path.absolute())
    try:
        prompt = sidecar.read_text(encoding="utf-8-sig").strip() if sidecar.is_file() else ""
    except UnicodeDecodeError as problem:
        reason = f"{sidecar}: not UTF-8 ({problem.reason} at byte {problem.start})"
        return Item(row_id, where, "", None, error=reason)
    return Item(row_id, where, prompt, ImageRef(path=path, source=str(path)))


def _folders_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_dir())


def _image_jsonl(path: Path) -> Path | None:
    """The JSONL file (or the only one in a folder) whose first line names an image rather than a pair."""
    from mmalign.data.fields import BadRow
    from mmalign.data.jsonl import read_objects

    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            return None
        path = found[0]
    if not path.is_file() or path.suffix.lower() not in (".jsonl", ".ndjson"):
        return None
    for _, _, values in read_objects(path):
        if not isinstance(values, BadRow):
            return path if "chosen" not in values and any(name in values for name in IMAGE_FIELDS) else None
    return None


def _jsonl_items(file: Path) -> Iterator[Item]:
    from mmalign.data.fields import BadRow, parse_image
    from mmalign.data.jsonl import JsonlImageRef, read_objects

    for line, offset, values in read_objects(file):
        source = f"{file}:{line}"
        if isinstance(values, BadRow):
            yield Item(source, None, "", None, error=str(values))
            continue
        name = next((name for name in IMAGE_FIELDS if name in values), None)
        prompt_name = next((key for key in PROMPT_FIELDS if key in values), None)
        prompt = values[prompt_name] if prompt_name is not None else ""
        row_id = str(values.get("id") if values.get("id") is not None else source)
        columns = {key: value for key, value in values.items() if key not in (name, prompt_name, "id")}
        try:
            if name is None:
                raise ValueError(f"no image; expected one of the fields {', '.join(IMAGE_FIELDS)}")
            if prompt is None:
                prompt = ""
            if not isinstance(prompt, str):
                raise ValueError(f"{prompt_name!r} is {prompt!r}; it must be text")
            found = parse_image(values[name], file.parent)
        except ValueError as error:
            yield Item(
                row_id, None, prompt if isinstance(prompt, str) else "", None, columns, error=f"{source}: {error}"
            )
            continue
        if isinstance(found, Path):
            yield Item(row_id, str(found.absolute()), prompt, ImageRef(path=found, source=f"{source} {name}"), columns)
        else:
            embedded = JsonlImageRef(path=file, source=f"{source} {name}", offset=offset, column=name)
            yield Item(row_id, embedded.source, prompt, embedded, columns)


def _pair_items(data: str, format: str, options: dict[str, Any]) -> Iterator[Item]:
    """Both sides of each row that a data reader yields; bad rows keep a line, rows dropped on purpose do not."""
    from mmalign import registry
    from mmalign.data.fields import BadRow
    from mmalign.data.readers import detect_format, locate

    name = detect_format(data) if format == "auto" else format
    reader = registry.resolve("reader", name)
    for row in reader(locate(data), **registry.check_options("reader", name, reader, options)):
        if isinstance(row, BadRow):
            yield Item(row.source, None, "", None, error=str(row))
        elif isinstance(row, Row):
            if row.chosen is None:
                yield Item(row.id, None, row.prompt, None, error=f"{row.source}: a prompt alone; nothing to score")
                continue
            yield _response_item(row, row.chosen, None if row.rejected is None else "chosen")
            if row.rejected is not None:
                yield _response_item(row, row.rejected, "rejected")


def _response_item(row: Row, response: ImageRef | str, side: str | None) -> Item:
    if isinstance(response, ImageRef):
        return Item(row.id, _shown(response), row.prompt, response, row.columns, side)
    path = _shown(row.images[0]) if row.images else None
    return Item(row.id, path, row.prompt, None, row.columns, side, response=response, shown=row.images)


def _shown(ref: ImageRef) -> str:
    """The image file, absolute; for an image inside a table or a JSONL line the place that error messages name."""
    return str(ref.path.absolute()) if type(ref) is ImageRef and ref.path is not None else ref.source


def _open(item: Item) -> tuple[Item, Any, str | None]:
    """(item, its image or the list of images its answer is about, why there is none)."""
    try:
        if item.response is not None:
            return item, [ref.open() for ref in item.shown], None
        return item, None if item.image is None else item.image.open(), item.error
    except DataError as error:
        return item, None, str(error)


def _score_batch(
    scorer: Scorer, batch: Sequence[tuple[Item, Any, str | None]]
) -> Iterator[tuple[Item, dict[str, Any], float]]:
    """(item, JSON record, score or NaN) in the order of the batch."""
    readable = [(item, image) for item, image, _ in batch if image is not None]
    output = scorer.score(
        [image for _, image in readable],
        [item.prompt for item, _ in readable],
        [
            item.columns if item.response is None else {**item.columns, "responses": item.response}
            for item, _ in readable
        ],
        require_valid=False,
    )
    assert output.errors is not None
    position = 0
    for item, image, error in batch:
        score, sub_scores = math.nan, {}
        if image is not None:
            score, error = float(output.scores[position]), output.errors[position]
            sub_scores = {key: _json_number(float(values[position])) for key, values in output.sub_scores.items()}
            position += 1
        record = {
            "id": item.id,
            "path": item.path,
            **({} if item.side is None else {"side": item.side}),
            "prompt": item.prompt,
            **({} if item.response is None else {"response": item.response}),
            "score": _json_number(score),
            "sub_scores": sub_scores,
            "error": error,
            "reward": scorer.name,
            "fingerprint": scorer.fingerprint,
        }
        yield item, record, score


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


@contextlib.contextmanager
def _output(out: str | Path | None, stream: IO[str]) -> Iterator[IO[str]]:
    """`stream`, or a file that appears under its name only when everything was written."""
    if out is None:
        yield stream
        return
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        # mkstemp makes private files; a result should be as readable as any other.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
