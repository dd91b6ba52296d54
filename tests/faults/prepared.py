"""What the process of a command with a bad input is given before it begins. It imports little: each one imports it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

MEMORY = 3 << 30  # bytes of address space that a command may take more than the server of forks has


def prepare(stdin: str = "", denied: bool = False, doctor: bool = False) -> None:
    """stdin: a file to read there. denied: without the rights of root, who reads everything. doctor: without its
    examination of packages, which takes long."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if denied and os.geteuid() == 0:  # by its capabilities
        assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
    if stdin:
        sys.stdin = open(stdin, encoding="utf-8")  # noqa: SIM115 - for as long as the process
    if doctor:
        import fm9g.doctor

        fm9g.doctor.check_packages = lambda: ([], {})
