"""Writing to disk so that a name either holds something whole or what it held before."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fm9g.errors import UserError


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    overwrite: a folder that is there and holds something is replaced, after the new one is whole; else UserError.
    Whatever ends the block early (a full disk included, reported as UserError) leaves `target` as it was.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; remove it or choose another name")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"{target}: the folder holds something; choose another or allow it to be replaced (--overwrite)"
        )
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        raise as_user_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; a file written there becomes `target` if the block ends without an error."""
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise as_user_error(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk, not only in the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_user_error(error: OSError, target: Path) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError(f"{target}: the disk is full; nothing was changed. Free some space and try again")
    return UserError(f"{target}: cannot be written: {error.strerror or error}")
