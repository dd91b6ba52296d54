"""A clock for tests of limits of time."""

from __future__ import annotations


class StandStill:
    """A clock of a program that is stopped for an hour at its first look at it, and then goes on."""

    def __init__(self, looks: int) -> None:
        self.now, self._left = 0.0, looks

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds if self.now else 3600.0
        self._left -= 1
        if not self._left:
            raise InterruptedError
