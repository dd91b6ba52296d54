"""Signals of a run: SIGINT and SIGTERM end it between two steps, with a checkpoint; SIGUSR1 has one written."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While its block runs, the first SIGINT or SIGTERM only sets `requested`, a second one acts as usual; SIGUSR1 sets
    `wants_save`, which whoever saves sets back."""

    def __init__(self, ending: str = "stopping with a checkpoint after this step and its evaluation") -> None:
        """ending: what messages say of it."""
        self.requested, self.wants_save, self._ending = False, False, ending
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number, handler in (
            (signal.SIGINT, self._stop),
            (signal.SIGTERM, self._stop),
            (signal.SIGUSR1, self._save),
        ):
            try:
                self._before[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        name = signal.Signals(number).name
        print(f"{name}: {self._ending}; Ctrl-C again ends at once", file=sys.stderr)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, self._before[again])

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.wants_save = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
