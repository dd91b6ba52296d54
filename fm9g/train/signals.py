"""Signals of a run: SIGINT and SIGTERM end it after the current step, with a checkpoint; SIGUSR1 only saves one."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any


class SignalHandler:
    """Turns signals into flags while its block runs.

    The first SIGINT or SIGTERM sets `stop_requested`; the second acts as if there were no handler. SIGUSR1 sets
    `save_requested`, which is reset by whoever saves.
    """

    def __init__(self, stop_message: str = "stopping with a checkpoint after this step and its evaluation") -> None:
        """stop_message: what the console says on the first SIGINT or SIGTERM."""
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
            except ValueError:  # only the main thread may set handlers
                break
        return self

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        name = signal.Signals(number).name
        # Not by the logger: the signal may have interrupted it while it held its lock.
        print(f"{name}: {self._stop_message}; Ctrl-C again ends at once", file=sys.stderr)
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, self._previous_handlers[again])

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
