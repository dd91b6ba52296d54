"""Where the time of steps goes, and how much work was done in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fm9g.data.pack import Pack
from fm9g.plan.sizes import attended

SPANS = ("data", "communication", "evaluation", "checkpoint")


@dataclass(frozen=True)
class Lap:
    """Of the steps since the lap before, on this process: seconds; those of SPANS; steps; tokens; squares, of the
    lengths of documents, as fm9g.plan.sizes.attended adds them up."""

    seconds: float
    spans: dict[str, float]
    steps: int
    tokens: int
    squares: float


class Clock:
    """Counts the host's time. What a GPU does meanwhile is not waited for."""

    def __init__(self, windows: tuple[int, ...] = (0,)) -> None:
        """windows: of the model's layers, as ModelConfig has them."""
        self._windows = windows
        self._start()

    def _start(self) -> None:
        self._began, self._spans = time.monotonic(), dict.fromkeys(SPANS, 0.0)
        self._steps = self._tokens = 0
        self._squares = 0.0

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time that goes to one of SPANS."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spans[name] += time.monotonic() - began

    def count(self, packs: list[Pack]) -> None:
        """The packs of one more step of this process."""
        self._steps += 1
        for pack in packs:
            self._tokens += pack.tokens
            lengths = np.diff(pack.cu_seqlens[pack.cu_seqlens <= pack.tokens]).tolist()
            self._squares += attended(self._windows, lengths)

    def lap(self, communication: float = 0.0) -> Lap:
        """What there was since the lap before. communication: further seconds of it, which others measured."""
        self._spans["communication"] += communication
        lap = Lap(time.monotonic() - self._began, self._spans, self._steps, self._tokens, self._squares)
        self._start()
        return lap
