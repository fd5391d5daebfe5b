"""Wall time by phase: load, cache, train, evaluate …; nested phases are counted once, where they happen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Phases:
    """Seconds by name. Reading includes the phases that are still open, so that a checkpoint in training sees its time."""

    def __init__(self) -> None:
        self._done: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.monotonic()

    def add(self, earlier: Mapping[str, float]) -> None:
        """Seconds of the interrupted part of this run."""
        for name, seconds in earlier.items():
            self._done[name] = self._done.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        self._settle()
        return dict(self._done)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def _settle(self) -> None:
        """Book the time since the last change on the innermost open phase."""
        now = time.monotonic()
        if self._open:
            name = self._open[-1]
            self._done[name] = self._done.get(name, 0.0) + now - self._since
        self._since = now
