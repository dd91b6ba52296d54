"""Why a run ended: one record, one sentence, the same on every node; and how long each part of ending may take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fm9g.printable import printable

# Exit codes; EXIT_CONNECTION_LOST is between a worker and its agent only.
EXIT_FAILURE, EXIT_USER_ERROR, EXIT_CONNECTION_LOST, EXIT_INTERRUPTED = 1, 2, 69, 130


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong.

    rank: None where a whole node is meant. host: "" where it never said its name. code: what all processes exit with:
    2 for a user's mistake, 130 when interrupted, else 1, and only that is worth another attempt. detail: a traceback,
    or the last lines of a log. unreachable: the rank cannot say it itself.
    """

    cause: str
    rank: int | None
    host: str
    node: int
    code: int = EXIT_FAILURE
    detail: str = ""
    unreachable: bool = False

    @property
    def message(self) -> str:
        host = f" on host {self.host}" if self.host else ""
        if self.rank is None:
            return f"node {self.node}{host}: {self.cause}"
        return f"rank {self.rank}{host} (node {self.node}): {self.cause}"

    @property
    def text(self) -> str:
        """The message, and below it the detail, fit for a terminal: they come from other machines."""
        lines = [f"fm9g: {self.message}", *(f"  | {line}" for line in self.detail.splitlines())]
        return "\n".join(map(printable, lines))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Failure:
        """What a process wrote on the KV store; whatever that is, it is a failure."""
        try:
            failure = Failure(**values)
            texts = (failure.cause, failure.host, failure.detail)
            numbers = (failure.node, failure.code, 0 if failure.rank is None else failure.rank)
            if all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers):
                return replace(
                    failure,
                    code=failure.code if 0 < failure.code < 256 else EXIT_FAILURE,
                    unreachable=bool(failure.unreachable),
                )
        except TypeError:
            pass
        return Failure(f"a process ended with what is no record of a failure: {str(values)[:200]!r}", None, "", 0)


class RunFailedError(Exception):
    """Carries the failure that a run ends with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class Timing:
    """How one figure, the seconds within which everything has to end, is divided. All values are seconds.

    The worst case is a node that vanishes: `heartbeat_timeout` until it is noticed, then `settle_time` for the
    other nodes to end their processes and say so.
    """

    timeout: float

    @property
    def heartbeat_interval(self) -> float:
        """Between two signs of life."""
        return min(2.0, max(0.1, self.timeout / 20))

    @property
    def heartbeat_timeout(self) -> float:
        """Without a sign of life, or without an answer of the KV store."""
        return self.timeout / 2

    @property
    def grace_period(self) -> float:
        """For processes to end by themselves once a failure is recorded."""
        return self.timeout / 10

    @property
    def settle_time(self) -> float:
        """From a failure until all nodes have ended their processes."""
        return self.timeout / 5


class HeartbeatTracker:
    """Who has not given a sign of life for how long; by the clock of the one who listens, since clocks differ."""

    def __init__(self, now: float) -> None:
        self._start, self._last_change = now, dict[int, tuple[Any, float]]()

    def update(self, statuses: dict[int, Any], now: float) -> dict[int, float]:
        """statuses: for each peer something that changes while it lives; None: it has not begun. Returns the
        seconds since each changed, or since the start."""
        for peer, status in statuses.items():
            if peer not in self._last_change:
                self._last_change[peer] = (None, self._start)
            if status != self._last_change[peer][0]:
                self._last_change[peer] = (status, now)
        return {peer: now - self._last_change[peer][1] for peer in statuses}
