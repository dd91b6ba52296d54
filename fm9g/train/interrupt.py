"""Ctrl-C and SIGTERM end a run between two steps, so that it can save."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While its block runs, the first SIGINT or SIGTERM only sets `requested`; a second signal acts as usual."""

    def __init__(self, ending: str = "stopping with a checkpoint after this step") -> None:
        """ending: what messages say of it."""
        self.requested, self._ending = False, ending
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        name = signal.Signals(number).name
        print(f"{name}: {self._ending}; Ctrl-C again ends at once", file=sys.stderr)
        for again, handler in self._before.items():
            signal.signal(again, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
