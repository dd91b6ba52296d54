"""Where the time of steps goes, and how much work was done in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fm9g.data.load.packing import Pack
from fm9g.plan.sizes import attended

PHASES = ("data", "communication", "evaluation", "checkpoint")


@dataclass(frozen=True)
class StepTimings:
    """Of the steps since the last collect_and_reset, on this process: seconds; those of PHASES; steps; tokens;
    sum_sq_seqlens, of the lengths of documents, as fm9g.plan.sizes.attended adds them up."""

    seconds: float
    phases: dict[str, float]
    steps: int
    tokens: int
    sum_sq_seqlens: float


class StepTimer:
    """Counts the host's time. What a GPU does meanwhile is not waited for."""

    def __init__(self, windows: tuple[int, ...] = (0,)) -> None:
        """windows: of the model's layers, as ModelConfig has them."""
        self._windows = windows
        self._start()

    def _start(self) -> None:
        self._began, self._phases = time.monotonic(), dict.fromkeys(PHASES, 0.0)
        self._steps = self._tokens = 0
        self._sum_sq_seqlens = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time that goes to one of PHASES."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] += time.monotonic() - began

    def count(self, packs: list[Pack]) -> None:
        """The packs of one more step of this process."""
        self._steps += 1
        for pack in packs:
            self._tokens += pack.tokens
            lengths = np.diff(pack.cu_seqlens[pack.cu_seqlens <= pack.tokens]).tolist()
            self._sum_sq_seqlens += attended(self._windows, lengths)

    def collect_and_reset(self, communication: float = 0.0) -> StepTimings:
        """What there was since the last call. communication: further seconds of it, which others measured."""
        self._phases["communication"] += communication
        timings = StepTimings(
            time.monotonic() - self._began, self._phases, self._steps, self._tokens, self._sum_sq_seqlens
        )
        self._start()
        return timings
