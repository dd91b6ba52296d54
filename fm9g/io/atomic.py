"""Files and folders that appear under their name only when complete.

A file or folder NAME is written as a temporary sibling and then renamed:

    .NAME.<number>.new   created, about to be locked
    .NAME.<number>.tmp   locked by the process that writes it
    .NAME.<number>.old   the former NAME, moved aside until the new one has its name

A sibling without a lock belongs to a process that was killed.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fm9g.errors import UserError
from fm9g.io.inputs import check_output
from fm9g.io.lock import hold_lock, is_locked
from fm9g.io.os_errors import os_errors_as_user_error

logger = logging.getLogger(__name__)

_TEMP_NAME = re.compile(r"\.(.+)\.[0-9]+\.(tmp|old|new)", re.DOTALL)
_MAX_CLOCK_SKEW = 60.0  # seconds between the clocks of this machine and of a file system


@contextmanager
def atomic_dir(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` if the block ends without an error.

    Args:
        target: the folder to create.
        overwrite: replace an existing folder with content, after the new one is complete; else raise UserError.
            A folder that contains an input (fm9g.io.inputs) is never replaced.

    An error in the block leaves `target` unchanged. A full disk is reported as UserError.
    """
    target = Path(os.path.realpath(target))  # Path.resolve() fails on a loop of links
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; remove it or choose another name")
    recover_interrupted(target)
    _check_replaceable(target, overwrite)
    temporary, old = _temp_siblings(target)
    try:
        with os_errors_as_user_error(target), ExitStack() as locks:
            target.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_create_locked(temporary, is_folder=True))
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_path(file)
            _check_replaceable(target, overwrite)  # again: another process may have been faster
            if target.exists():
                locks.enter_context(hold_lock(target))
                target.rename(old)
            temporary.rename(target)
            fsync_path(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # if moving back fails now, `recover_interrupted` does it later
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    check_output(target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target}: the folder is not empty; choose another one or replace it with --overwrite")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there becomes `target` if the block ends without an error.

    Raises UserError if `target` is an input (fm9g.io.inputs), exists and is not a file, or cannot be written.
    """
    target = Path(os.path.realpath(target))
    check_output(target)
    if target.exists() and not target.is_file():  # a device, say, which a file must not replace
        raise UserError(f"{target}: something that is not a file is in the way; remove it or choose another name")
    recover_interrupted(target)
    temporary, _ = _temp_siblings(target)
    try:
        with os_errors_as_user_error(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _create_locked(temporary, is_folder=False):
                yield temporary
                fsync_path(temporary)
                check_output(target)  # again: the block may have read it
                temporary.replace(target)
            fsync_path(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def recover_interrupted(target: Path) -> None:
    """Repairs `target` after a process was killed while writing it.

    Moves the former content back if nothing replaced it, and deletes incomplete content.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*"):
        name, kind = parse_temp_name(leftover)
        if name != target.name or _is_in_use(leftover):
            continue
        if kind == "old" and not target.exists():
            leftover.rename(target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def clean_stale_temps(folder: Path) -> None:
    """Calls `recover_interrupted` for everything in a folder that killed processes were writing."""
    for leftover in folder.glob(".*.*.*"):
        name, _ = parse_temp_name(leftover)
        if not name or _is_in_use(leftover):
            continue
        if leftover.is_dir():
            recover_interrupted(folder / name)
        else:
            leftover.unlink(missing_ok=True)


def parse_temp_name(path: Path) -> tuple[str, str]:
    """The name of the target of a temporary, and the temporary's kind: tmp, old or new; empty texts for others."""
    match = _TEMP_NAME.fullmatch(path.name)
    return (match[1], match[2]) if match else ("", "")


def atomic_rmtree(folder: Path) -> None:
    """Deletes a folder so that it never exists partially under its name."""
    temporary, _ = _temp_siblings(folder)
    with hold_lock(folder):
        folder.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Creates the folder and a file in it, so that a run learns at its start if it cannot save."""
    try:
        with atomic_file(folder / "probe") as temporary:
            temporary.write_bytes(b"")
    finally:
        with suppress(OSError):
            (folder / "probe").unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Returns when the file or folder is on the disk, not only in the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temp_siblings(target: Path) -> tuple[Path, Path]:
    """The .tmp and .old names of `target` for this write. No process on any machine has the same ones."""
    number = secrets.randbelow(10**9)
    return target.parent / f".{target.name}.{number}.tmp", target.parent / f".{target.name}.{number}.old"


@contextmanager
def _create_locked(path: Path, is_folder: bool) -> Iterator[None]:
    """Creates an empty folder or file that is locked before it gets its name."""
    new = path.with_suffix(".new")
    try:
        new.mkdir() if is_folder else new.touch(exist_ok=False)
        with hold_lock(new):
            new.rename(path)
            yield
    finally:
        with suppress(OSError):
            new.rmdir() if is_folder else new.unlink()


def _is_in_use(temporary: Path) -> bool:
    """Whether a process, on any machine, is still working on a temporary. Assumes so if nobody can tell."""
    try:
        if temporary.suffix == ".new" and time.time() - temporary.stat().st_mtime < _MAX_CLOCK_SKEW:
            return True  # its process is about to lock it
        locked = is_locked(temporary)
    except OSError:  # its process has just renamed or deleted it
        return True
    if locked is None:
        logger.warning(f"{temporary}: this file system has no locks; delete it if no process is writing it")
        return True
    return locked
