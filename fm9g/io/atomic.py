"""Writing to disk so that a name either holds something whole or what it held before."""

from __future__ import annotations

import errno
import fcntl
import glob
import mmap
import os
import resource
import secrets
import shutil
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from fm9g.errors import UserError
from fm9g.io.inputs import check_output, register_input

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")  # what names of pictures end in

_TEMP_SUFFIXES = (
    "tmp",
    "old",
    "new",
)  # of what is beside a name while it is written: see _temp_siblings and _create_locked
_MAX_CLOCK_SKEW = 60.0  # seconds that the clock of a file system may be off
_DISK_FULL_BYTES = 64 * 1024  # bytes free below which a failed write means a full disk


@contextmanager
def atomic_dir(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    overwrite: a folder that is there and holds something is replaced, after the new one is whole; else UserError.
    One that holds an input (fm9g.io.inputs) is never replaced.
    Whatever ends the block early (a full disk included, reported as UserError) leaves `target` as it was.
    """
    target = Path(os.path.realpath(target))  # Path.resolve() fails on a loop of links
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; remove it or choose another name")
    recover_interrupted(target)
    _check_replaceable(target, overwrite)
    temporary, old = _temp_siblings(target)
    try:
        with _as_user_error(target), ExitStack() as locks:
            target.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_create_locked(temporary, is_folder=True))
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_path(file)
            _check_replaceable(target, overwrite)  # again: another process may have been quicker
            if target.exists():
                locks.enter_context(_locked(target))
                target.rename(old)
            temporary.rename(target)
            fsync_path(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # what cannot be moved back now, `recover_interrupted` moves
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    check_output(target)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"{target}: the folder holds something; choose another or allow it to be replaced (--overwrite)"
        )


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; a file written there becomes `target` if the block ends without an error.

    Raises UserError for a target that is an input (fm9g.io.inputs) or no file, and for one that cannot be written.
    """
    target = Path(os.path.realpath(target))
    check_output(target)
    if target.exists() and not target.is_file():  # a device, say, which must not become a file
        raise UserError(f"{target}: something that is no file is in the way; remove it or choose another name")
    recover_interrupted(target)
    temporary, _ = _temp_siblings(target)
    try:
        with _as_user_error(target):
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


def check_output_file(output: Path, key: str, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Raises UserError where `output` cannot be the page or picture that a command writes.

    key: that gives it. suffixes: one of which it must have. overwrite: an existing file may be replaced, but never an
    input.
    """
    if output.suffix.lower() not in suffixes:
        raise UserError(f"{key}: found {str(output)!r}, expected a name that ends in {' or '.join(suffixes)}")
    if output.is_dir():
        raise UserError(f"{output}: a folder is in the way; choose another {key}")
    check_output(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output}: is already there; choose another {key}, or replace it with --overwrite")


class AppendWriter:
    """A new file that grows at its end, written past the page cache where the file system allows that.

    What is written has to reach the disk before it counts, so the cache would only be a detour, and one that costs
    more than the writing where memory is slow to come by.
    """

    _ALIGNMENT = 4096  # of what is written past the cache

    def __init__(self, path: Path, buffer_size: int = 1 << 19) -> None:
        """buffer_size: bytes written at a time, a multiple of 4096."""
        self._file = _open_direct(path)
        self._buffer = memoryview(mmap.mmap(-1, buffer_size))  # aligned
        self._filled = 0

    def write(self, data: bytes) -> None:
        """Appends data."""
        rest = memoryview(data)
        while rest:
            part = rest[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._advance(len(part))
            rest = rest[len(part) :]

    def copy(self, source: str, start: int, end: int) -> None:
        """Appends bytes `start` to `end` of another file."""
        file = os.open(source, os.O_RDONLY)
        try:
            while start < end:
                part = self._buffer[self._filled : self._filled + end - start]
                count = os.preadv(file, [part], start)
                if not count:
                    raise UserError(f"{source}: became shorter while it was read; let it be written to its end first")
                self._advance(count)
                start += count
        finally:
            os.close(file)

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == len(self._buffer):
            self._flush()

    def _flush(self) -> None:
        written = 0
        while written < self._filled:
            if (self._filled - written) % self._ALIGNMENT or written % self._ALIGNMENT:
                _clear_direct_flag(self._file)  # the last, uneven piece goes through the cache
            written += os.write(self._file, self._buffer[written : self._filled])
        self._filled = 0

    def __enter__(self) -> AppendWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            os.close(self._file)


def stat_signature(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class RandomAccessFile:
    """A file that is read at any place.

    Of all such files of a process the last ones that were read stay open: as many as a quarter of the limit on open
    files, and 256 at most. A mixture may have more datasets than a process may have open files.
    """

    _open_files: ClassVar[OrderedDict[RandomAccessFile, int]] = (
        OrderedDict()
    )  # the one that was read last is the last one
    # Reentrant: garbage collection may close a file while this one is opened.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._status = stat_signature(path.stat())
        register_input(path)

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset` on. Raises UserError where the file was changed or replaced."""
        with self._lock:
            descriptor = self._descriptor()
            data = os.pread(descriptor, size, offset)
            if stat_signature(os.fstat(descriptor)) != self._status:
                raise UserError(f"{self._path}: was changed or replaced while it was read; start again")
            return data

    def _descriptor(self) -> int:
        if self in self._open_files:
            self._open_files.move_to_end(self)
            return self._open_files[self]
        max_open = min(256, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        while len(self._open_files) >= max_open:
            self._close_oldest()
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDONLY)
                break
            except OSError as error:
                if not is_too_many_open_files(error):
                    raise UserError(f"{self._path}: {error.strerror}; it was being read") from None
                if not self._open_files:
                    raise
                self._close_oldest()
        self._open_files[self] = descriptor
        return descriptor

    @classmethod
    def _close_oldest(cls) -> None:
        os.close(cls._open_files.popitem(last=False)[1])

    def close(self) -> None:
        with self._lock:
            if self in self._open_files:
                os.close(self._open_files.pop(self))


def is_too_many_open_files(error: BaseException) -> bool:
    """Whether an error says that a process has as many files open as it may."""
    known = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return known or "Too many open files" in str(error)  # as h5py says it


def too_many_open_files(target: Path | str) -> UserError:
    """For the user who wanted `target`."""
    max_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"{target}: cannot be opened: a process may have {max_open} files open here, and no more. Raise that in the "
        "shell that starts it: `ulimit -n 65536`; if it refuses, an "
        "administrator raises it in /etc/security/limits.conf"
    )


def raise_open_file_limit() -> None:
    """Raises this process's limit on open files to what the system allows it; its children inherit that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # an infinite limit that the system does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system says that cannot do it
            raise
        return os.open(path, flags, 0o666)


def _clear_direct_flag(file: int) -> None:
    if hasattr(os, "O_DIRECT"):
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)


def recover_interrupted(target: Path) -> None:
    """Cleans up after a process that was killed while it wrote the folder or file `target`.

    What it had moved aside comes back where nothing took its place; what it left half-written is deleted.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*"):
        number, _, kind = leftover.name.removeprefix(f".{target.name}.").partition(".")
        if not number.isdecimal() or kind not in _TEMP_SUFFIXES or _is_locked(leftover):
            continue
        if kind == "old" and not target.exists():
            leftover.rename(target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


@contextmanager
def exclusive_lock(folder: Path, timeout: float) -> Iterator[None]:
    """Holds a folder (made where it is not there) for this process, against others that do the same.

    timeout: seconds to wait for another, which may be ending. Raises UserError where it does not.
    """
    with _as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder}: another run of this name is writing there; wait for its end or choose another "
                        "--model_unique"
                    ) from None
                time.sleep(0.2)
            except OSError:
                print(
                    f"note: {folder}: this file system has no locks: start no second run of this name", file=sys.stderr
                )
                break
        yield
    finally:
        os.close(descriptor)


def clean_stale_temps(folder: Path) -> None:
    """Cleans up after killed processes that wrote in a folder: see `recover_interrupted`, for all that is there."""
    for leftover in folder.glob(".*.*.*"):
        name, number, kind = leftover.name[1:].rsplit(".", 2)
        if not number.isdecimal() or kind not in _TEMP_SUFFIXES or _is_locked(leftover):
            continue
        if leftover.is_dir():
            recover_interrupted(folder / name)
        else:
            leftover.unlink(missing_ok=True)


def atomic_rmtree(folder: Path) -> None:
    """Deletes a folder so that it is never there in part under its name."""
    gone, _ = _temp_siblings(folder)
    with _locked(folder):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _temp_siblings(target: Path) -> tuple[Path, Path]:
    """Names for what becomes `target`, and for what was there; no other process, on any machine, has the same."""
    number = secrets.randbelow(10**9)
    return target.parent / f".{target.name}.{number}.tmp", target.parent / f".{target.name}.{number}.old"


@contextmanager
def _create_locked(path: Path, is_folder: bool) -> Iterator[None]:
    """Makes an empty folder or file that is locked from the moment when it has its name."""
    new = path.with_suffix(".new")
    try:
        new.mkdir() if is_folder else new.touch(exist_ok=False)
        with _locked(new):
            new.rename(path)
            yield
    finally:
        with suppress(OSError):
            new.rmdir() if is_folder else new.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock, which ends with this process at the latest. What is locked may get another name meanwhile."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_locked(leftover: Path) -> bool:
    """Whether a process, here or on another machine, is at work on it. Where nobody can tell, the user is told."""
    try:
        if (
            leftover.suffix == ".new" and time.time() - leftover.stat().st_mtime < _MAX_CLOCK_SKEW
        ):  # it is about to be locked
            return True
        descriptor = os.open(leftover, os.O_RDONLY)
    except OSError:  # it has just gone
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        print(f"note: {leftover}: this file system has no locks; delete it if nothing writes there", file=sys.stderr)
        return True
    finally:
        os.close(descriptor)
    return False


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it, so that a run learns before it starts that it cannot save."""
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


@contextmanager
def _as_user_error(target: Path) -> Iterator[None]:
    """Turns what a failed write raises into a UserError that names `target`."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise as_user_error(error, target) from error
    except Exception as error:
        # What torch raises when it closes a file that could not be written hides the error of the system.
        hidden = error.__context__
        while hidden is not None:
            if isinstance(hidden, OSError):
                raise as_user_error(hidden, target) from error
            hidden = hidden.__context__
        # torch, safetensors and tokenizers report a full disk each in a class and in words of their own.
        with suppress(OSError):
            full = shutil.disk_usage(_existing_parent(target)).free < _DISK_FULL_BYTES
            if full or "No space left" in str(error):
                raise as_user_error(OSError(errno.ENOSPC, ""), target) from error
        raise


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.parent)


def as_user_error(error: OSError, target: Path) -> UserError:
    """What an error of the system means for the user who wanted `target`."""
    if error.errno == errno.ENOSPC:
        return UserError(f"{target}: the disk is full; nothing was changed. Free some space and try again")
    if is_too_many_open_files(error):
        return too_many_open_files(target)
    if error.filename and not _concerns(error.filename, target):
        return UserError(f"{os.fsdecode(error.filename)}: cannot be read: {error.strerror}")
    return UserError(f"{target}: cannot be written: {error.strerror or error}")


def _concerns(name: str | bytes, target: Path) -> bool:
    """Whether a path is `target`, in it or above it, or what is beside it while it is written: see _temp_siblings."""
    path = Path(os.path.abspath(os.fsdecode(name)))
    is_temporary = str(path).startswith(str(target.parent / f".{target.name}."))
    return is_temporary or path.is_relative_to(target) or target.is_relative_to(path)
