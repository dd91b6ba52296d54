"""Finds jumps of the loss."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable


class LossSpikeDetector:
    """Compares each logged loss with those before it."""

    def __init__(self, sigmas: float, losses: Iterable[float] = (), window: int = 64, min_losses: int = 16) -> None:
        """A spike is a loss this far above the mean of the last losses.

        Args:
            sigmas: distance in standard deviations of the last losses; 0: no loss is a spike.
            losses: those logged before.
            window: how many of the last losses count.
            min_losses: with fewer than these, no loss is a spike.
        """
        self._sigmas, self._min_losses = sigmas, min_losses
        self._losses = deque(losses, maxlen=window)

    def add(self, loss: float) -> float | None:
        """Adds a finite loss. Returns the mean of the losses before if this one is a spike, else None."""
        mean = None
        if self._sigmas and len(self._losses) >= self._min_losses:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            # A loss that hardly moves has tiny deviations; a thousandth of it is no spike.
            if loss <= mean + self._sigmas * max(deviation, 1e-3 * mean):
                mean = None
        self._losses.append(loss)
        return mean
