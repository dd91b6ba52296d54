"""Memory of this process: how glibc allocates it, and how much is resident."""

from __future__ import annotations

import ctypes
import resource

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # options of mallopt(3)


def tune_malloc() -> None:
    """Makes glibc reuse large freed blocks. Does nothing with another C library.

    By default every large array is new memory from the system, and on virtual machines its page faults can cost more
    than the work on it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def rss_bytes() -> int:
    """Resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
