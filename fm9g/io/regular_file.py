"""Before a file is opened by its name: whether it is one, and of a size that can be meant."""

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
    """Raises UserError for what is there and is no file: a pipe is waited for, and a device may have no end.

    max_bytes: bytes above which a file is refused, too. What is not there is left to whoever opens it.
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
    """What a path leads to that is no regular file, in words; empty for a file."""
    kind = stat.S_IFMT(status.st_mode)
    return "" if kind == stat.S_IFREG else _KINDS.get(kind, "something else")
