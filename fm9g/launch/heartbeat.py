"""Heartbeats: how long each part of ending a run may take, and which peer has been silent for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Divides `timeout`, the seconds within which every process ends after a failure. All values are seconds.

    The worst case is a node that vanishes:

        0                 timeout/2                        timeout
        |-- heartbeat_timeout --|-- settle_time --|-- reserve --|
        last heartbeat          failure recorded  all nodes have ended their workers
    """

    timeout: float

    @property
    def heartbeat_interval(self) -> float:
        """Between two heartbeats."""
        return min(2.0, max(0.1, self.timeout / 20))

    @property
    def heartbeat_timeout(self) -> float:
        """Without a heartbeat of a peer, or without an answer of the KV store."""
        return self.timeout / 2

    @property
    def grace_period(self) -> float:
        """For workers to end by themselves once a failure is recorded."""
        return self.timeout / 10

    @property
    def settle_time(self) -> float:
        """From a failure until all nodes have ended their workers."""
        return self.timeout / 5

    @property
    def ack_timeout(self) -> float:
        """For all peers to acknowledge a request: they read it with their next heartbeat."""
        return self.grace_period + 2 * self.heartbeat_interval


class HeartbeatTracker:
    """Measures the silence of peers by the clock of the listener, since clocks of machines differ."""

    def __init__(self, now: float) -> None:
        self._start, self._last_change = now, dict[int, tuple[Any, float]]()

    def update(self, statuses: Sequence[Any], now: float) -> list[float]:
        """Returns per peer the seconds since its status changed, or since the start.

        Args:
            statuses: per peer, a value that changes with each heartbeat; None before the first.
            now: monotonic seconds.
        """
        for peer, status in enumerate(statuses):
            last, _ = self._last_change.setdefault(peer, (None, self._start))
            if status != last:
                self._last_change[peer] = (status, now)
        return [now - self._last_change[peer][1] for peer in range(len(statuses))]
