"""What the process of a command with a bad input is given before it begins. It imports little: each one imports it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

MEMORY = 3 << 30  # bytes of address space that a command may take more than the server of forks has


def prepare(stdin: str = "", denied: bool = False, doctor: bool = False) -> None:
    """stdin: a file to read there. denied: without the rights of root, who reads everything. doctor: without its
    examination of packages, which takes long."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if denied:
        drop_privileges()
    if stdin:
        sys.stdin = open(stdin, encoding="utf-8")  # noqa: SIM115 - for as long as the process
    if doctor:
        import fm9g.doctor.command

        fm9g.doctor.command.check_packages = lambda: ([], {})


def drop_privileges() -> None:
    """Takes the capabilities from this process with which root reads and writes the files of others."""
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    if libc.capset((ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
