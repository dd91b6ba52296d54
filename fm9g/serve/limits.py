"""What one request, and all together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from fm9g.errors import UserError
from fm9g.serve.errors import ApiError

RETRY_SECONDS = 5  # after which a client may try again


@dataclass(frozen=True)
class Limits:
    """Limits of a server. Raises UserError for one that is not positive.

    Args:
        max_body_bytes: of a request.
        max_queue: continuations that may wait for a place.
        max_choices: continuations of one request.
        request_timeout: seconds of one request, with its time in the queue.
        shutdown_timeout: seconds that running requests have when the server stops.
    """

    max_body_bytes: int = 4 << 20
    max_queue: int = 256
    max_choices: int = 128
    request_timeout: float = 600.0
    shutdown_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name}: found {value:g}, expected more than 0")

    def check_count(self, num_new: int, num_waiting: int) -> None:
        """Raises ApiError if a request asks for too much, or too many others wait."""
        if num_new > self.max_choices:
            raise ApiError(
                400, f"n: {num_new} continuations are more than {self.max_choices}; send several requests", "n"
            )
        if num_waiting + num_new > self.max_queue + self.max_choices or num_waiting >= self.max_queue:
            raise ApiError(
                429,
                f"{num_waiting} requests wait already; try again later",
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )
