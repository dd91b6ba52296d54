"""Errors of the operating system as messages that name the file and the remedy."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fm9g.errors import UserError
from fm9g.io.open_files import is_too_many_open_files, too_many_open_files

_DISK_FULL_BYTES = 64 * 1024  # free bytes below which a failed write means a full disk


def as_user_error(error: OSError, target: Path) -> UserError:
    """Explains an error of the operating system to a user who wanted to write `target`."""
    if error.errno == errno.ENOSPC:
        return UserError(f"{target}: the disk is full; nothing was changed. Free some space and try again")
    if is_too_many_open_files(error):
        return too_many_open_files(target)
    if error.filename and not _concerns(error.filename, target):
        return UserError(f"{os.fsdecode(error.filename)}: cannot be read: {error.strerror}")
    return UserError(f"{target}: cannot be written: {error.strerror or error}")


@contextmanager
def os_errors_as_user_error(target: Path) -> Iterator[None]:
    """Turns the errors of a failed write into a UserError that names `target`."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise as_user_error(error, target) from error
    except Exception as error:
        # torch closes the file after a failed write, and the error of closing hides the one of the system.
        hidden = error.__context__
        while hidden is not None:
            if isinstance(hidden, OSError):
                raise as_user_error(hidden, target) from error
            hidden = hidden.__context__
        # torch, safetensors and tokenizers each report a full disk with their own class and text.
        with suppress(OSError):
            full = shutil.disk_usage(_existing_parent(target)).free < _DISK_FULL_BYTES
            if full or "No space left" in str(error):
                raise as_user_error(OSError(errno.ENOSPC, ""), target) from error
        raise


def truncated_error(path: Path | str) -> UserError:
    """The error for a file that has lost bytes since it was opened."""
    return UserError(f"{path}: the file became shorter while it was read; wait until it is completely written")


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.parent)


def _concerns(name: str | bytes, target: Path) -> bool:
    """Whether a path is `target`, inside it, above it, or one of its temporary siblings (see fm9g.io.atomic)."""
    path = Path(os.path.abspath(os.fsdecode(name)))
    is_temporary = str(path).startswith(str(target.parent / f".{target.name}."))
    return is_temporary or path.is_relative_to(target) or target.is_relative_to(path)
