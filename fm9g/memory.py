"""How this process gets its memory from the system."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks for the next allocation; elsewhere nothing happens.

    By default each large array is new memory from the system, and on virtual machines the page faults can cost more
    than what is done with it.
    """
    mmap_max, trim_threshold = -4, -1  # options of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
