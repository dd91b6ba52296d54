"""Why a run ended: the record of its first failure, which becomes one message, the same on every node."""

from __future__ import annotations

import os
import traceback
from dataclasses import asdict, dataclass, replace
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.consistency import RankMismatchError
from fm9g.launch.dist_env import RankInfo
from fm9g.launch.kv_store import KVClient
from fm9g.launch.worker_group import TAIL_LINES
from fm9g.printable import printable

# Exit codes; EXIT_CONNECTION_LOST is between a worker and its agent only.
EXIT_FAILURE, EXIT_USER_ERROR, EXIT_CONNECTION_LOST, EXIT_INTERRUPTED = 1, 2, 69, 130
TORCH_DISTRIBUTED_PATH = os.path.join("torch", "distributed", "")  # the code in which a rank waits for its peers


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong.

    Args:
        cause: one sentence.
        rank: None if the failure is that of a node.
        host: name of its machine; "" if it never sent one.
        node: number of its machine.
        code: exit code of all processes: 2 for a user's mistake, 130 if interrupted, else 1. Only 1 may be retried.
        detail: a traceback, or the last lines of a log.
        unreachable: the rank cannot print the message itself.
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
        """One sentence that names the rank or the node."""
        host = f" on host {self.host}" if self.host else ""
        if self.rank is None:
            return f"node {self.node}{host}: {self.cause}"
        return f"rank {self.rank}{host} (node {self.node}): {self.cause}"

    @property
    def text(self) -> str:
        """The message and the detail below it, made safe for a terminal: they come from other machines."""
        lines = [f"fm9g: {self.message}", *(f"  | {line}" for line in self.detail.splitlines())]
        return "\n".join(map(printable, lines))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Failure:
        """Reads a record of the KV store. An invalid record is a failure, too."""
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
        return Failure(f"a process sent an invalid record of its failure: {str(values)[:200]!r}", None, "", 0)


class RunFailedError(Exception):
    """Carries the failure that ends the run."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_key(attempt: int) -> str:
    """The key of the KV store under which the failure of an attempt is recorded."""
    return f"{attempt}/failure"


def record_failure(kv_client: KVClient, attempt: int, failure: Failure) -> Failure:
    """Records a failure for all processes; returns the recorded one, which is another if that came first.

    Raises ConnectionLostError.
    """
    return Failure.from_json(kv_client.set_if_absent(failure_key(attempt), failure.to_json()))


def classify_exception(error: BaseException, rank_info: RankInfo, host: str) -> Failure:
    """Returns the failure of this rank. Its detail is the traceback, except for a user's mistake."""
    code, cause = exit_code(error), _cause(error)
    if isinstance(error, RankMismatchError):
        return Failure(cause, error.rank, error.host, error.rank // rank_info.local_world_size, code)
    trace = "".join(traceback.format_exception(error)).splitlines() if code == EXIT_FAILURE else []
    return Failure(cause, rank_info.rank, host, rank_info.node_rank, code, "\n".join(trace[-TAIL_LINES:]))


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILURE
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE


def is_probably_secondary(error: BaseException) -> bool:
    """Whether an exception comes from communication, so that the death of another rank may have caused it."""
    if exit_code(error) != EXIT_FAILURE:
        return False
    if any(cls.__name__ == "DistError" for cls in type(error).__mro__):
        return True
    # Autograd raises the errors of collective operations in backward; only their text shows where they come from.
    if any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed by peer", "connection reset")):
        return True
    return any(TORCH_DISTRIBUTED_PATH in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _cause(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
