"""Memory of this process: how glibc allocates it, and how much is resident."""

from __future__ import annotations

import contextlib
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


def available_bytes() -> float:
    """Memory of the machine that programs can still take, in bytes; infinite if the system does not report it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def reset_peak_rss() -> None:
    """Lets `peak_rss_bytes` count from now on, where the system can do that."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets VmHWM, see proc(5)


def peak_rss_bytes() -> int:
    """The largest resident memory of this process since `reset_peak_rss`, in bytes; 0 if it is not reported."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0
