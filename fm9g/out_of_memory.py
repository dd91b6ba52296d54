"""Recognizing that the memory, of this machine or of a GPU, was not enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fm9g.errors import UserError

TRAINING_OOM_ADVICE = (
    "lower batch_size or max_length (gradient_accumulation_steps or global_batch_size keeps the tokens per step), "
    "or set activation_checkpoint full; `fm9g plan` tells what fits"
)
# Messages of torch, its libraries and the dynamic loader, which have no error class for CPU memory.
_OOM_MESSAGES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "failed to map segment",
    "can't start new thread",
)
_MAX_REASON_LENGTH = 200


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of this machine or of a GPU was not enough."""
    if isinstance(error, UserError):
        return False
    text = str(error).lower()
    classes = (RuntimeError, OSError, ImportError)  # torch.OutOfMemoryError is a RuntimeError
    return isinstance(error, MemoryError) or (
        isinstance(error, classes) and any(message in text for message in _OOM_MESSAGES)
    )


@contextlib.contextmanager
def oom_as_user_error(advice: str) -> Iterator[None]:
    """Turns out-of-memory errors into one UserError. advice: what to do about it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split("\n")[0].split())[:_MAX_REASON_LENGTH]
        raise UserError(f"out of memory{f' ({reason})' if reason else ''}: {advice}") from error
