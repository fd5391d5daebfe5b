"""From `config.data` to the rows of a run: reader, bad rows, limit, swap and label noise.

Deterministic: the result depends on the data, the config and the seed, not on the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmalign import registry
from mmalign.data.digests import CELL_FIELDS, replace_file
from mmalign.data.fields import BadRow, Dropped
from mmalign.data.readers import detect_format, locate
from mmalign.randomness import uniform
from mmalign.types import DataError, ImageRef, Row

if TYPE_CHECKING:
    from mmalign.config import DataConfig
    from mmalign.data.digests import DigestIndex
    from mmalign.data.features import Features

T = TypeVar("T")
R = TypeVar("R")
NUM_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class RowSet:
    """The rows of a run.

    Args:
        rows: usable rows in the order of the source, swapped and noised as configured.
        counts: `rows`, `bad`, `swapped`, `noisy`, `ties_soft`, and what the reader dropped, e.g. `ties_dropped`.
        fingerprint: changes when ids, prompts, preferences, or the images that a row names change. Image files are
            not read for it.
        bad: rows that were skipped.
    """

    rows: list[Row]
    counts: dict[str, int]
    fingerprint: str
    bad: list[BadRow] = field(default_factory=list, repr=False)


def load_rows(config: DataConfig, *, seed: int, bad_rows_path: Path | None = None) -> RowSet:
    """Read, check and order-independently perturb the rows.

    Args:
        seed: of `label_noise`.
        bad_rows_path: where skipped rows are listed, one JSON object per line; an older list there is removed.

    Raises `DataError` on the first bad row (`on_bad_row: error`), on two rows with one id, when no usable row is left,
    and when all rows are ties. Raises `ValueError` on an unknown reader or reader option.
    """
    rows, bad, counts = read_rows(config, stop_at_bad=config.on_bad_row == "error")
    write_bad_rows(bad_rows_path, bad)
    if not rows:
        raise DataError(_no_rows(config.path, bad, counts))
    if counts["ties_soft"] == len(rows):
        raise DataError(
            f"{config.path}: all {len(rows)} rows are ties (preference 0.5), so there is nothing to learn; "
            f"check the labels"
        )
    rows = [_perturbed(row, config, seed, counts) for row in rows]
    return RowSet(rows, dict(counts), fingerprint(rows), bad)


def read_rows(config: DataConfig, *, stop_at_bad: bool) -> tuple[list[Row], list[BadRow], Counter[str]]:
    """Rows up to `config.limit` as they stand in the source, with bad rows and counts. Raises `DataError`."""
    name = detect_format(config.path) if config.format == "auto" else config.format
    reader = registry.resolve("reader", name)
    options = registry.check_options("reader", name, reader, dict(config.options))
    rows: list[Row] = []
    bad: list[BadRow] = []
    counts: Counter[str] = Counter({"rows": 0, "bad": 0, "swapped": 0, "noisy": 0, "ties_soft": 0})
    seen: dict[str, str] = {}
    for item in reader(locate(config.path), **options):
        if isinstance(item, Dropped):
            counts[item.kind] += 1
            continue
        if isinstance(item, Row) and item.id in seen:
            item = BadRow(item.source, f"the id {item.id!r} is already used by {seen[item.id]}; ids must be unique")
        if isinstance(item, BadRow):
            if stop_at_bad:
                raise stopped_by(item)
            bad.append(item)
            counts["bad"] += 1
            continue
        if not isinstance(item, Row):
            raise DataError(f"reader {name!r} gave a {type(item).__name__}; it must yield Row, BadRow or Dropped")
        seen[item.id] = item.source
        rows.append(item)
        counts["rows"] += 1
        counts["ties_soft"] += item.rejected is not None and item.preference == 0.5
        if config.limit is not None and len(rows) == config.limit:
            break
    return rows, bad, counts


def _no_rows(path: str, bad: Sequence[BadRow], counts: Counter[str]) -> str:
    ties = counts["ties_dropped"]
    if ties and not bad:
        return (
            f"{path}: no row is left: all {ties} labelled rows are ties and ties are dropped; "
            f"data.options.ties: soft keeps them, but without one clear preference there is nothing to learn"
        )
    if bad:
        return f"{path}: no usable row: {len(bad)} bad, {ties} ties dropped. The first bad row: {bad[0]}"
    return f"{path}: no rows; check data.path, data.format and the split"


def _perturbed(row: Row, config: DataConfig, seed: int, counts: Counter[str]) -> Row:
    if config.swap:
        row = row.swapped()
        counts["swapped"] += 1
    # By id, so that the same rows are flipped whatever the limit or the order.
    if config.label_noise > 0 and uniform(seed, "label_noise", row.id) < config.label_noise:
        row = row.swapped()
        counts["noisy"] += 1
    return row


def fingerprint(rows: Iterable[Row]) -> str:
    """A hash of what the rows say, the same wherever the data lies."""
    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        parts: list[Any] = [row.id, row.prompt, row.preference, row.margin, row.score_chosen, row.score_rejected]
        parts += [_named(row.chosen), _named(row.rejected)]
        if row.images or row.history:
            parts.append([_named(ref) for ref in (*row.images, *row.rejected_images)])
            parts.append([[turn.role, turn.text] for turn in row.history])
        state.update(json.dumps(parts).encode())
        state.update(b"\n")
    return state.hexdigest()


def content_fingerprint(named: str, rows: Iterable[Row], digests: DigestIndex) -> str:
    """`fingerprint` with the content of every image in it: a file replaced under the same name is other data."""
    state = hashlib.blake2b(named.encode(), digest_size=16)
    for row in rows:
        for ref in images_of(row):
            state.update(digests.digest(ref).encode())
    return state.hexdigest()


def images_of(row: Row) -> list[ImageRef]:
    """Every image of a row: its responses, what its prompt shows, and the negatives that came with it."""
    responses = [side for side in (row.chosen, row.rejected) if isinstance(side, ImageRef)]
    return [*responses, *row.images, *row.rejected_images]


def _named(side: ImageRef | str | None) -> str | list[str] | None:
    # A list, so that a text never equals the name of an image.
    return [side] if isinstance(side, str) else None if side is None else _image_name(side)


def _image_name(ref: ImageRef) -> str:
    if ref.content is not None:
        return ref.digest()
    cell = [str(getattr(ref, name)) for name in CELL_FIELDS if hasattr(ref, name)]
    item = getattr(ref, "item", None)
    if item is not None:
        cell.append(str(item))
    assert ref.path is not None
    return "/".join([*ref.path.parts[-2:], *cell])


def write_bad_rows(path: Path | None, bad: Sequence[BadRow]) -> None:
    """Replace the list at `path` in one step; without bad rows there is no list."""
    if path is None:
        return
    if not bad:
        path.unlink(missing_ok=True)
        return
    lines = (json.dumps({"source": row.source, "reason": row.reason}, ensure_ascii=False) for row in bad)
    replace_file(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def drop_bad(row_set: RowSet, bad: Sequence[BadRow], *, bad_rows_path: Path | None = None) -> RowSet:
    """`row_set` without rows whose images proved unusable (`CacheReport.bad`); they join the list of bad rows.

    Raises `DataError` when no row is left.
    """
    gone = {row.row_id for row in bad}
    if not gone:
        return row_set
    rows = [row for row in row_set.rows if row.id not in gone]
    all_bad = [*row_set.bad, *bad]
    write_bad_rows(bad_rows_path, all_bad)
    if not rows:
        raise DataError(f"no usable row is left: {len(all_bad)} bad. One of them: {bad[0]}")
    ties_soft = sum(row.rejected is not None and row.preference == 0.5 for row in rows)
    counts = {**row_set.counts, "rows": len(rows), "bad": len(all_bad), "ties_soft": ties_soft}
    return replace(row_set, rows=rows, counts=counts, fingerprint=fingerprint(rows), bad=all_bad)


def check_rows(row_set: RowSet, features: Features, config: DataConfig, *, bad_rows_path: Path | None = None) -> RowSet:
    """Ask the model's features whether each row can be used; decodes no image (`verify_images` does).

    With a cache `build_cache` asks on the way. Raises `DataError` on the first row that cannot be used
    (`on_bad_row: error`), else leaves these rows out.
    """
    problems = ((row, features.problem(row)) for row in row_set.rows)
    found = (BadRow(row.source, reason, row.id) for row, reason in problems if reason is not None)
    return drop_bad(row_set, list(_stop_or_pass(found, config)), bad_rows_path=bad_rows_path)


def verify_images(
    row_set: RowSet, features: Features, config: DataConfig, *, bad_rows_path: Path | None = None
) -> RowSet:
    """Decode every image that the run reads once: what `data.cache: true` checks on the way, for runs without a cache.

    Without a cache and with `on_bad_row: skip`, call this after `load_rows`; otherwise the first broken image stops
    the run at the step that needs it.

    Raises `DataError` on the first row with an undecodable image or two identical ones (`on_bad_row: error`), else
    leaves these rows out.
    """
    found = (problem for problem in map_threaded(partial(image_problem, features), row_set.rows) if problem is not None)
    return drop_bad(row_set, list(_stop_or_pass(found, config)), bad_rows_path=bad_rows_path)


def _stop_or_pass(found: Iterable[BadRow], config: DataConfig) -> Iterator[BadRow]:
    for problem in found:
        if config.on_bad_row == "error":
            raise stopped_by(problem)
        yield problem


def stopped_by(problem: BadRow) -> DataError:
    return DataError(f"{problem}. (data.on_bad_row: skip leaves bad rows out and lists them)")


def image_problem(features: Features, row: Row) -> BadRow | None:
    """What makes the images of a row unusable, found by reading them."""
    try:
        for ref in features.images_of(row):
            ref.open()
        return identical(row, ImageRef.digest)
    except DataError as error:
        return BadRow(row.source, str(error), row.id)


def identical(row: Row, digest: Callable[[ImageRef], str]) -> BadRow | None:
    """What is wrong with a row whose preferred and other images have the same content."""
    pair = [digest(side) for side in (row.chosen, row.rejected) if isinstance(side, ImageRef)]
    if len(pair) == 2 and pair[0] == pair[1]:
        reason = "chosen and rejected are the same image, byte for byte: nothing to prefer; remove the row"
        return BadRow(row.source, reason, row.id)
    if row.rejected_images and [digest(ref) for ref in row.images] == [digest(ref) for ref in row.rejected_images]:
        reason = (
            "images and rejected_images are the same, byte for byte: nothing to contrast; leave rejected_images out"
        )
        return BadRow(row.source, reason, row.id)
    return None


def map_threaded(function: Callable[[T], R], items: Iterable[T], *, ahead: int = 4 * NUM_THREADS) -> Iterator[R]:
    """`map` on a thread pool that works at most `ahead` items ahead, so that memory stays bounded. Keeps the order."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
