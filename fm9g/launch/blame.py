"""What an exception of a worker says about why the run ended."""

from __future__ import annotations

import os
import traceback

from fm9g.errors import UserError
from fm9g.launch.agree import DisagreementError
from fm9g.launch.failure import INTERRUPTED, OTHER, USER, Failure
from fm9g.launch.place import Place
from fm9g.launch.team import TAIL

TORCH_DISTRIBUTED = os.path.join("torch", "distributed", "")  # the code in which a rank waits for the others


def failure_of(error: BaseException, place: Place, host: str) -> Failure:
    """The failure of the process at this place and host; its detail is the traceback of what is no user's mistake."""
    code, cause = exit_code(error), _cause(error)
    if isinstance(error, DisagreementError):
        return Failure(cause, error.rank, error.host, error.rank // place.local_world_size, code)
    trace = "".join(traceback.format_exception(error)).splitlines() if code == OTHER else []
    return Failure(cause, place.rank, host, place.node, code, "\n".join(trace[-TAIL:]))


def exit_code(error: BaseException) -> int:
    """Of a process that ends with this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else OTHER
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return USER if isinstance(error, UserError) else OTHER


def may_be_echo(error: BaseException) -> bool:
    """Whether an exception comes out of communication, so that another rank's end may be behind it."""
    if exit_code(error) != OTHER:
        return False
    if any(cls.__name__ == "DistError" for cls in type(error).__mro__):
        return True
    # Errors of collective operations in backward come out of autograd, and only their text tells.
    if any(word in str(error).lower() for word in ("gloo", "nccl", "connection closed by peer", "connection reset")):
        return True
    return any(TORCH_DISTRIBUTED in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def _cause(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
