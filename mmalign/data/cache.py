"""Encode once: frozen image and text features on disk, addressed by content.

A key names everything the features depend on (image digest or prompt text, encoder and its settings, resolution, crop,
flip), so nothing ever has to be invalidated: another encoder simply has other keys. One small safetensors file per
entry, `<folder>/ab/ab12….safetensors`; several processes and runs may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.digests import DigestIndex, replace_file
from mmalign.data.fields import BadRow
from mmalign.types import DataError, Row, Side

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import DataConfig
    from mmalign.data.features import Entry, Features, Kind
    from mmalign.policies.base import Policy

LAYOUT = "mmalign-features-1"
MEMORY_BYTES = 512 * 2**20

Record = dict[str, "Tensor"]


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, else $MMALIGN_CACHE, else ~/.cache/mmalign; features lie in a folder of their own below."""
    base = config.cache_dir or os.environ.get("MMALIGN_CACHE") or "~/.cache/mmalign"
    return Path(base).expanduser() / "features"


def feature_key(kind: str, encoder_key: str, *parts: Any) -> str:
    """32 hex digits that depend on all arguments; parts must be JSON values."""
    text = json.dumps([LAYOUT, kind, encoder_key, *parts])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class FeatureCache:
    """Records of CPU tensors by key, on disk and, most recently used first, in memory.

    Records are shared between callers: never modify their tensors in place.

    Args:
        folder: created when the first entry is written.
        memory_bytes: budget of the part in memory.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.folder = folder
        self.digests = DigestIndex(folder / "digests")
        self.memory_bytes = memory_bytes
        self._memory: OrderedDict[str, tuple[Record, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Record | None:
        """The record, or None when it is absent or its file is damaged (with a warning; the caller encodes again)."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key][0]
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        record = _parse(content, key)
        if record is None:
            warnings.warn(f"cache entry {path} is damaged; it is encoded again", RuntimeWarning, stacklevel=2)
            return None
        self._remember(key, record)
        return record

    def put(self, key: str, record: Record) -> int:
        """Store a record; returns the size of its file in bytes. Raises `DataError` when the disk does not take it."""
        from safetensors.torch import save

        body = save(record)
        checksum = _checksum(body[8 + int.from_bytes(body[:8], "little") :])
        content = save(record, metadata={"key": key, "checksum": checksum})
        try:
            replace_file(self.path(key), content)
        except OSError as error:
            raise DataError(
                f"cannot write the cache below {self.folder}: {error}; free space there, "
                f"or set data.cache_dir, or data.cache: false"
            ) from error
        self._remember(key, record)
        return len(content)

    def size(self, key: str) -> int | None:
        """Bytes of a complete entry on disk, None if there is none. Reads the header only: finds truncated files, not
        flipped bits (those are found by `get`)."""
        try:
            with self.path(key).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start)) if start < size else {}
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None
        return size if size == 8 + start + end else None

    def _remember(self, key: str, record: Record) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in record.values())
        with self._lock:
            if key in self._memory:
                self._used -= self._memory.pop(key)[1]
            self._memory[key] = (record, size)
            self._used += size
            while self._used > self.memory_bytes:
                _, (_, freed) = self._memory.popitem(last=False)
                self._used -= freed


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _parse(content: bytes, key: str) -> Record | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        start = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:start])["__metadata__"]
        if metadata["key"] != key or metadata["checksum"] != _checksum(content[start:]):
            return None
        return load(content)
    except (ValueError, LookupError, TypeError, RecursionError, SafetensorError):
        return None


@dataclass(frozen=True)
class CacheReport:
    """What `build_cache` did.

    Args:
        num_images: different images (by content).
        num_prompts: different prompts, the empty one included; 0 where prompts are token ids, which are not cached.
        encoded, reused: entries made now and found in the cache; an image has one entry per crop and flip, or negative.
        bytes: of these entries on disk.
        seconds: wall time.
        bad: rows that cannot be used (`on_bad_row: skip`): drop them with `load.drop_bad`.
    """

    num_images: int
    num_prompts: int
    encoded: int
    reused: int
    bytes: int
    seconds: float
    bad: list[BadRow] = field(default_factory=list)

    def __str__(self) -> str:
        bad = f", {len(self.bad)} bad rows" if self.bad else ""
        return (
            f"{self.num_images} images and {self.num_prompts} prompts: {self.encoded} encoded, {self.reused} reused, "
            f"{self.bytes / 2**20:.1f} MiB, {self.seconds:.1f} s{bad}"
        )


def build_cache(
    policy: Policy,
    rows: Sequence[Row],
    config: DataConfig,
    cache: FeatureCache,
    *,
    seed: int,
    share: tuple[int, int] = (0, 1),
    negatives: bool = False,
    sides: Sequence[Side] = ("chosen", "rejected"),
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 8,
) -> CacheReport:
    """Encode what `rows` need and the cache lacks, each different prompt and image once per variant (crop and flip;
    image negative). Also the place where undecodable images, identical pairs and over-long rows come to light.

    Args:
        rows: all rows of the run.
        seed: of the run; random crops and negatives depend on it.
        share: (process, processes); each encodes a slice of the rows, together they fill a shared cache.
        negatives: whether the method contrasts images, so that their negatives are encoded too.
        sides: the responses that the method reads; images of the other one are hashed, not decoded.
        progress: called with (items done, items in all).
        batch_size: images or prompts per encoder call.

    Raises `DataError` on the first bad row (`on_bad_row: error`); with `skip` bad rows are in the report.
    """
    from mmalign.data.features import make_features

    started = time.monotonic()
    features = make_features(policy, config, cache, seed=seed, rows=rows, negatives=negatives, sides=sides)
    build = _Build(features, cache, config, batch_size, processes=share[1])
    mine = rows[share[0] :: share[1]]
    prompts = features.prompt_entries(mine)
    total = len(prompts) + len(mine)
    try:
        for done in build.prompts(prompts):
            if progress is not None:
                progress(done, total)
        for done in build.images(mine):
            if progress is not None:
                progress(len(prompts) + done, total)
    finally:
        cache.digests.flush()
    return CacheReport(
        num_images=len(build.digests),
        num_prompts=len(prompts),
        encoded=build.encoded,
        reused=build.reused,
        bytes=build.bytes,
        seconds=time.monotonic() - started,
        bad=build.bad,
    )


@dataclass
class _Missing:
    """A row's images that the cache lacks, decoded and ready to encode; or why the row is bad."""

    digests: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    prepared: dict[str, tuple[Any, str]] = field(default_factory=dict)
    problem: BadRow | None = None


class _Build:
    def __init__(
        self, features: Features, cache: FeatureCache, config: DataConfig, batch_size: int, processes: int
    ) -> None:
        self.features, self.cache, self.config, self.batch_size = features, cache, config, batch_size
        self.processes = processes
        self.encoded = self.reused = self.bytes = 0
        self.bad: list[BadRow] = []
        self.digests: set[str] = set()
        self._done: set[str] = set()
        self._pending: dict[str, tuple[Any, str]] = {}
        self._to_come = 0  # images of rows not looked at yet, at most
        self._sized: set[Kind] = set()

    def prompts(self, entries: Sequence[Entry]) -> Iterator[int]:
        missing = []
        for entry in entries:
            size = self.cache.size(entry.key)
            if size is None:
                missing.append(entry)
            else:
                self.reused += 1
                self.bytes += size
        for start in range(0, len(missing), self.batch_size):
            chunk = missing[start : start + self.batch_size]
            to_come = len(missing) - start - len(chunk)
            self._encode("prompt", {entry.key: (entry.prepare(), entry.source) for entry in chunk}, to_come)
            yield len(entries) - len(missing) + start + len(chunk)

    def images(self, rows: Sequence[Row]) -> Iterator[int]:
        from mmalign.data.load import map_threaded, stopped_by

        for done, found in enumerate(map_threaded(self._missing, rows), start=1):
            if found.problem is not None:
                if self.config.on_bad_row == "error":
                    raise stopped_by(found.problem)
                self.bad.append(found.problem)
            else:
                self._to_come = (len(rows) - done) * len(found.keys)
                self._take(found)
            yield done
        while self._pending:
            self._encode_pending()

    def _missing(self, row: Row) -> _Missing:
        """Runs in threads: check, hash, look up, decode."""
        from mmalign.data.load import identical

        found = _Missing()
        reason = self.features.problem(row)
        if reason is not None:
            return _Missing(problem=BadRow(row.source, reason, row.id))
        try:
            found.digests = [self.cache.digests.digest(ref) for ref in self.features.images_of(row)]
            problem = identical(row, self.cache.digests.digest)
            if problem is not None:
                return _Missing(problem=problem)
            for entry in self.features.image_entries(row):
                found.keys.append(entry.key)
                if entry.key not in self._done and self.cache.size(entry.key) is None:
                    found.prepared[entry.key] = (entry.prepare(), entry.source)
        except DataError as error:
            return _Missing(problem=BadRow(row.source, str(error).removeprefix(f"{row.source}: "), row.id))
        return found

    def _take(self, found: _Missing) -> None:
        self.digests.update(found.digests)
        for key in found.keys:
            if key in self._done:
                continue
            self._done.add(key)
            if key in found.prepared:
                self._pending[key] = found.prepared[key]
            else:
                self.reused += 1
                self.bytes += self.cache.size(key) or 0
        while len(self._pending) >= self.batch_size:
            self._encode_pending()

    def _encode_pending(self) -> None:
        keys = list(self._pending)[: self.batch_size]
        chunk = {key: self._pending.pop(key) for key in keys}
        self._encode("image", chunk, len(self._pending) + self._to_come)

    def _encode(self, kind: Kind, chunk: dict[str, tuple[Any, str]], to_come: int) -> None:
        records = self.features.encode(kind, [ready for ready, _ in chunk.values()], [s for _, s in chunk.values()])
        written = sum(self.cache.put(key, record) for key, record in zip(chunk, records, strict=True))
        self.bytes += written
        self.encoded += len(chunk)
        if kind not in self._sized:
            self._sized.add(kind)
            self._warn_if_too_large(kind, self.processes * to_come, written / len(chunk))

    def _warn_if_too_large(self, kind: Kind, to_come: int, bytes_each: float) -> None:
        """Said after the first chunk, not by a full disk hours later: one prompt of T5 takes megabytes. At most: rows may
        share images, and the cache may have some."""
        free = shutil.disk_usage(self.cache.folder).free
        if to_come * bytes_each > free:
            warnings.warn(
                f"up to {to_come} more {kind}s need up to {to_come * bytes_each / 2**30:.1f} GiB below {self.cache.folder}, "
                f"where {free / 2**30:.1f} GiB are free; set data.cache_dir to a larger disk, or data.cache: false",
                RuntimeWarning,
                stacklevel=2,
            )
