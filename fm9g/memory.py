"""How this process gets its memory from the system, and what it says where there is not enough."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from collections.abc import Iterator

from fm9g.errors import UserError


def tune_malloc() -> None:
    """Has glibc keep large freed blocks for the next allocation; elsewhere nothing happens.

    By default each large array is new memory from the system, and on virtual machines the page faults can cost more
    than what is done with it.
    """
    mmap_max, trim_threshold = -4, -1  # options of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def rss_bytes() -> int:
    """What this process has of the machine's memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


# What the errors of torch, its libraries and the loader of libraries say. CPUs have no class of their own for it.
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory, of this machine or of a GPU, did not suffice."""
    if isinstance(error, UserError):
        return False
    text = str(error).lower()
    kinds = (RuntimeError, OSError, ImportError)  # torch.OutOfMemoryError is a RuntimeError
    return isinstance(error, MemoryError) or (isinstance(error, kinds) and any(sign in text for sign in _OOM_MESSAGES))


@contextlib.contextmanager
def oom_as_user_error(advice: str) -> Iterator[None]:
    """Turns errors of a memory that does not suffice into one UserError. advice: what to do about it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split("\n")[0].split())[:200]
        raise UserError(f"out of memory{f' ({reason})' if reason else ''}: {advice}") from error


TRAINING_OOM_ADVICE = (
    "lower batch_size or max_length (gradient_accumulation_steps or global_batch_size keeps the tokens of a step), "
    "or set activation_checkpoint full; `fm9g plan` tells what fits"
)
