"""What an exception of a worker says about why the run ended."""

from __future__ import annotations

import os
import traceback

from fm9g.errors import UserError
from fm9g.launch.consistency import RankMismatchError
from fm9g.launch.dist_env import RankInfo
from fm9g.launch.failure import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, Failure
from fm9g.launch.worker_group import TAIL_LINES

TORCH_DISTRIBUTED_PATH = os.path.join("torch", "distributed", "")  # the code in which a rank waits for the others


def classify_exception(error: BaseException, rank_info: RankInfo, host: str) -> Failure:
    """The failure of this rank on this host; its detail is the traceback of what is no user's mistake."""
    code, cause = exit_code(error), _cause(error)
    if isinstance(error, RankMismatchError):
        return Failure(cause, error.rank, error.host, error.rank // rank_info.local_world_size, code)
    trace = "".join(traceback.format_exception(error)).splitlines() if code == EXIT_FAILURE else []
    return Failure(cause, rank_info.rank, host, rank_info.node_rank, code, "\n".join(trace[-TAIL_LINES:]))


def exit_code(error: BaseException) -> int:
    """Of a process that ends with this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILURE
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE


def is_probably_secondary(error: BaseException) -> bool:
    """Whether an exception comes out of communication, so that another rank's end may be behind it."""
    if exit_code(error) != EXIT_FAILURE:
        return False
    if any(cls.__name__ == "DistError" for cls in type(error).__mro__):
        return True
    # Errors of collective operations in backward come out of autograd, and only their text tells.
    if any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed by peer", "connection reset")):
        return True
    return any(TORCH_DISTRIBUTED_PATH in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _cause(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
