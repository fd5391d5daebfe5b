"""Ctrl-C and SIGTERM ask the loop to finish its step, write a checkpoint and leave; a second one leaves at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Context manager; `requested` turns true on the first signal that falls into a `graceful` block.

    Elsewhere (loading, building a cache, evaluating) a signal interrupts at once: there is no step to finish, and every
    file of the run is written whole or not at all.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._graceful = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread (a notebook's executor): the host handles its own signals
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._graceful:
            raise KeyboardInterrupt
        self.requested = number
        print(f"\n{signal.Signals(number).name}: finishing this step, then writing a checkpoint (again: leave at once)")
