"""Advisory locks on files and folders. The system releases them when their process ends."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fm9g.errors import UserError
from fm9g.io.os_errors import os_errors_as_user_error

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.2


def try_lock(descriptor: int) -> bool | None:
    """Tries to take an exclusive lock, which lasts until the descriptor is closed.

    Returns:
        True if the lock is taken, False if another process has it, None if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Holds a lock on a file or folder if that is possible. The path may be renamed meanwhile."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool | None:
    """Whether a process, on any machine, has locked the path; None if the file system has no locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        taken = try_lock(descriptor)
    finally:
        os.close(descriptor)
    return None if taken is None else not taken


@contextmanager
def exclusive_lock(folder: Path, timeout: float, busy: str) -> Iterator[None]:
    """Reserves a folder for this process and creates the folder if it is missing.

    Args:
        folder: the folder to reserve.
        timeout: seconds to wait for a process that has the lock and may be ending.
        busy: what the message says if another process keeps the lock, and what to do.

    Raises UserError if another process keeps the lock. Without locks in the file system, warns and continues.
    """
    with os_errors_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + timeout
        while (taken := try_lock(descriptor)) is False:
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: {busy}")
            time.sleep(_RETRY_SECONDS)
        if taken is None:
            logger.warning(f"{folder}: this file system has no locks: nothing stops a second process here")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def wait_lock(file: Path, waiting: str) -> Iterator[None]:
    """Holds the lock on a file, which is created if it is missing, and waits for as long as another process holds it.

    waiting: what is logged if there is another one. Without locks in the file system, continues at once.
    """
    with os_errors_as_user_error(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if try_lock(descriptor) is False:
            logger.info(waiting)
            while try_lock(descriptor) is False:
                time.sleep(_RETRY_SECONDS)
        yield
    finally:
        os.close(descriptor)
