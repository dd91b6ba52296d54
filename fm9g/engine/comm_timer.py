"""The time that messages between processes take."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class CommTimer:
    """Sums the time of `with` blocks: on a CPU by the host's clock, on a GPU by events of the stream, read later."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds, self._started = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []  # start and end of a block

    def __enter__(self) -> None:
        if self._cuda:
            event: Any = torch.cuda.Event
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.monotonic() - self._started

    def collect_and_reset(self) -> float:
        """Seconds since the last call. Waits for the GPU."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
