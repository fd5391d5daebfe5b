"""Content digests of images, remembered between runs: 300 GB of JPEGs are hashed once, not at every start.

A digest is remembered under the image's location: file, size and modification time, and the cell for tables. A changed
file has another location and is hashed again. Images held in memory are hashed each time; that is cheap.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path

from mmalign.types import ImageRef

CELL_FIELDS = ("row", "offset", "column")


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that every reader sees the old or the new file, never half of one; several writers may race.

    Not synced to disk: a power cut may leave a damaged file, which readers of a cache must expect anyway.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def location(ref: ImageRef) -> str | None:
    """Identity of the place an image lies in and of the file's version; None for images in memory.

    References into data sets of several files bring the `version` of all of them, empty when there are no files.
    """
    if ref.path is None:
        return None
    version = getattr(ref, "version", None)
    if version is None:
        try:
            status = ref.path.stat()
        except OSError:
            return None
        version = f"{status.st_size}:{status.st_mtime_ns}"
    elif not version:
        return None
    cell = [getattr(ref, name, None) for name in CELL_FIELDS]
    item = getattr(ref, "item", None)
    if item is not None:
        cell.append(item)
    text = json.dumps([str(ref.path.absolute()), version, *cell])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class DigestIndex:
    """location -> digest, in memory and, after `flush`, in 16 JSON files. Safe with threads and several processes.

    Args:
        folder: None keeps everything in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, str]] = {}
        self._new: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def digest(self, ref: ImageRef) -> str:
        """The content digest of `ref`; reads the image only when its location is new. Raises `DataError`."""
        place = location(ref)
        if place is None:
            return ref.digest()
        with self._lock:
            known = self._shard(place[0]).get(place)
        if known is not None:
            return known
        digest = ref.digest()
        with self._lock:
            self._shard(place[0])[place] = digest
            self._new.setdefault(place[0], {})[place] = digest
        return digest

    def flush(self) -> None:
        """Write what is new. Two processes that flush at once may lose entries, which are then hashed again."""
        with self._lock:
            if self.folder is None:
                return
            for shard, new in self._new.items():
                merged = {**self._read(shard), **new}
                replace_file(self._path(shard), json.dumps(merged).encode())
            self._new.clear()

    def _shard(self, name: str) -> dict[str, str]:
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> dict[str, str]:
        if self.folder is None:
            return {}
        try:
            found = json.loads(self._path(name).read_bytes())
        except (OSError, ValueError):
            return {}  # Absent or damaged: the images are hashed again.
        return found if isinstance(found, dict) else {}

    def _path(self, shard: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{shard}.json"
