"""The limit on open files: recognize it, explain it, raise it."""

from __future__ import annotations

import errno
import resource
from contextlib import suppress
from pathlib import Path

from fm9g.errors import UserError


def is_too_many_open_files(error: BaseException) -> bool:
    """Whether an error says that this process, or the system, has reached its limit on open files."""
    known = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return known or "Too many open files" in str(error)  # h5py raises other classes with this text


def too_many_open_files(target: Path | str) -> UserError:
    """The error for a user who wanted to open `target`; it says how to raise the limit."""
    max_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"{target}: cannot be opened: this process may have only {max_open} files open. Raise the limit in the shell "
        "that starts it: `ulimit -n 65536`; if the shell refuses, an administrator can raise it in "
        "/etc/security/limits.conf"
    )


def raise_open_file_limit() -> None:
    """Raises the soft limit on open files to the hard limit, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # an infinite limit that the system does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
