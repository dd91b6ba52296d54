"""Signals of a run: SIGINT and SIGTERM end it between two steps, with a checkpoint; SIGUSR1 has one written."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class SignalHandler:
    """While its block runs, the first SIGINT or SIGTERM only sets `stop_requested`, a second one acts as usual; SIGUSR1
    sets `save_requested`, which whoever saves sets back."""

    def __init__(self, stop_message: str = "stopping with a checkpoint after this step and its evaluation") -> None:
        """stop_message: what messages say of it."""
        self.stop_requested, self.save_requested, self._stop_message = False, False, stop_message
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> SignalHandler:
        for number, handler in (
            (signal.SIGINT, self._on_stop),
            (signal.SIGTERM, self._on_stop),
            (signal.SIGUSR1, self._on_save),
        ):
            try:
                self._previous_handlers[number] = signal.signal(number, handler)
            except ValueError:  # not the main thread: signals are somebody else's
                break
        return self

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        name = signal.Signals(number).name
        print(f"{name}: {self._stop_message}; Ctrl-C again ends at once", file=sys.stderr)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, self._previous_handlers[again])

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
