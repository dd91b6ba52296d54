"""Checks on a path before it is opened: that it is a regular file of a plausible size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fm9g.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | Path, max_bytes: int | None = None) -> None:
    """Raises UserError if the path exists and is not a regular file: a pipe may block, and a device may be endless.

    A missing file is left to the caller. max_bytes: limit on the size.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    if kind := special_file_kind(status):
        raise UserError(f"{path}: found {kind}, expected a file")
    if max_bytes is not None and status.st_size > max_bytes:
        raise UserError(
            f"{path}: has {status.st_size / 2**20:.0f} MB, expected at most {max_bytes >> 20}; is it the right file?"
        )


def special_file_kind(status: os.stat_result) -> str:
    """What a path leads to, in words; empty for a regular file."""
    kind = stat.S_IFMT(status.st_mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "something else")
