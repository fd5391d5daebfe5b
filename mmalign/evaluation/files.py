"""Files that are either complete or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmalign.run import atomic


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; renamed to `path` when the block ends well, removed otherwise.

    Not synced to disk, unlike checkpoints: an image lost with the power is made again, and there are thousands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{atomic.TEMPORARY}{path.name}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)


def slug(text: str, length: int = 40) -> str:
    """A readable piece of a file name: letters, digits and hyphens."""
    cleaned = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower()
    return cleaned[:length].rstrip("-.") or "x"
