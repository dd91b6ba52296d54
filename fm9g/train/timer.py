"""Where the time of steps goes, and how much work was done in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fm9g.data.load.packing import Pack
from fm9g.model.counts import sum_sq_seqlens

PHASES = ("data", "communication", "evaluation", "checkpoint")


@dataclass(frozen=True)
class StepTimings:
    """The steps of one rank since the timings before.

    Args:
        seconds: wall-clock time of all.
        phases: seconds of each of PHASES; the rest of the time is computation.
        steps: number of steps.
        tokens: tokens in their packs, without padding.
        sum_sq_seqlens: of their documents; see fm9g.model.counts.sum_sq_seqlens.
    """

    seconds: float
    phases: dict[str, float]
    steps: int
    tokens: int
    sum_sq_seqlens: float


class StepTimer:
    """Measures the time of the host. It does not wait for what a GPU does meanwhile."""

    def __init__(self, windows: tuple[int, ...] = (0,)) -> None:
        """windows: attention windows of the model's layers, as in ModelConfig."""
        self._windows = windows
        self._reset()

    def _reset(self) -> None:
        self._started, self._phases = time.monotonic(), dict.fromkeys(PHASES, 0.0)
        self._steps = self._tokens = 0
        self._sum_sq_seqlens = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block as one of PHASES."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] += time.monotonic() - started

    def count(self, packs: list[Pack]) -> None:
        """Counts one more step, with these packs of this rank."""
        self._steps += 1
        for pack in packs:
            self._tokens += pack.tokens
            seqlens = np.diff(pack.cu_seqlens[pack.cu_seqlens <= pack.tokens]).tolist()
            self._sum_sq_seqlens += sum_sq_seqlens(self._windows, seqlens)

    def collect_and_reset(self, communication: float = 0.0) -> StepTimings:
        """The timings since the last call. communication: further seconds of that phase, measured elsewhere."""
        self._phases["communication"] += communication
        seconds = time.monotonic() - self._started
        timings = StepTimings(seconds, self._phases, self._steps, self._tokens, self._sum_sq_seqlens)
        self._reset()
        return timings
