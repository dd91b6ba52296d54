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
from fm9g.inputs import check_output, note_input

PICTURES = (".png", ".svg", ".pdf")  # what names of pictures end in

_KINDS = ("tmp", "old", "new")  # of what is beside a name while it is written: see _beside and _made
_SKEW = 60.0  # seconds that the clock of a file system may be off
_FULL = 64 * 1024  # bytes free below which a failed write means a full disk


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends without an error.

    overwrite: a folder that is there and holds something is replaced, after the new one is whole; else UserError.
    One that holds an input (fm9g.inputs) is never replaced.
    Whatever ends the block early (a full disk included, reported as UserError) leaves `target` as it was.
    """
    target = Path(os.path.realpath(target))  # Path.resolve() fails on a loop of links
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; remove it or choose another name")
    recover(target)
    _check_replaceable(target, overwrite)
    temporary, old = _beside(target)
    try:
        with _as_user_error(target), ExitStack() as locks:
            target.parent.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_made(temporary, is_folder=True))
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            _check_replaceable(target, overwrite)  # again: another process may have been quicker
            if target.exists():
                locks.enter_context(_locked(target))
                target.rename(old)
            temporary.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # what cannot be moved back now, `recover` moves
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
def new_file(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; a file written there becomes `target` if the block ends without an error.

    Raises UserError for a target that is an input (fm9g.inputs) or no file, and for one that cannot be written.
    """
    target = Path(os.path.realpath(target))
    check_output(target)
    if target.exists() and not target.is_file():  # a device, say, which must not become a file
        raise UserError(f"{target}: something that is no file is in the way; remove it or choose another name")
    recover(target)
    temporary, _ = _beside(target)
    try:
        with _as_user_error(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _made(temporary, is_folder=False):
                yield temporary
                sync(temporary)
                check_output(target)  # again: the block may have read it
                temporary.replace(target)
            sync(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_output(output: Path, key: str, suffixes: tuple[str, ...], overwrite: bool) -> None:
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


class AppendedFile:
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
                _leave_direct(self._file)  # the last, uneven piece goes through the cache
            written += os.write(self._file, self._buffer[written : self._filled])
        self._filled = 0

    def __enter__(self) -> AppendedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            os.close(self._file)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class ReadFile:
    """A file that is read at any place.

    Of all such files of a process the last ones that were read stay open: as many as a quarter of the limit on open
    files, and 256 at most. A mixture may have more datasets than a process may have open files.
    """

    _opened: ClassVar[OrderedDict[ReadFile, int]] = OrderedDict()  # the one that was read last is the last one
    # Reentrant: garbage collection may close a file while this one is opened.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._status = identity(path.stat())
        note_input(path)

    def read(self, count: int, place: int) -> bytes:
        """Up to so many bytes from a place on. Raises UserError where the file was changed or replaced."""
        with self._lock:
            descriptor = self._descriptor()
            data = os.pread(descriptor, count, place)
            if identity(os.fstat(descriptor)) != self._status:
                raise UserError(f"{self._path}: was changed or replaced while it was read; start again")
            return data

    def _descriptor(self) -> int:
        if self in self._opened:
            self._opened.move_to_end(self)
            return self._opened[self]
        most = min(256, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        while len(self._opened) >= most:
            self._close_oldest()
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDONLY)
                break
            except OSError as error:
                if not is_too_many_open(error):
                    raise UserError(f"{self._path}: {error.strerror}; it was being read") from None
                if not self._opened:
                    raise
                self._close_oldest()
        self._opened[self] = descriptor
        return descriptor

    @classmethod
    def _close_oldest(cls) -> None:
        os.close(cls._opened.popitem(last=False)[1])

    def close(self) -> None:
        with self._lock:
            if self in self._opened:
                os.close(self._opened.pop(self))


def is_too_many_open(error: BaseException) -> bool:
    """Whether an error says that a process has as many files open as it may."""
    known = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    return known or "Too many open files" in str(error)  # as h5py says it


def too_many_open(target: Path | str) -> UserError:
    """For the user who wanted `target`."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"{target}: cannot be opened: a process may have {most} files open here, and no more. Raise that in the shell "
        "that starts it: `ulimit -n 65536`; if it refuses, an administrator raises it in /etc/security/limits.conf"
    )


def allow_many_open() -> None:
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


def _leave_direct(file: int) -> None:
    if hasattr(os, "O_DIRECT"):
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT)


def recover(target: Path) -> None:
    """Cleans up after a process that was killed while it wrote the folder or file `target`.

    What it had moved aside comes back where nothing took its place; what it left half-written is deleted.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*"):
        number, _, kind = leftover.name.removeprefix(f".{target.name}.").partition(".")
        if not number.isdecimal() or kind not in _KINDS or _is_held(leftover):
            continue
        if kind == "old" and not target.exists():
            leftover.rename(target)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


@contextmanager
def only_one(folder: Path, patience: float) -> Iterator[None]:
    """Holds a folder (made where it is not there) for this process, against others that do the same.

    patience: seconds to wait for another, which may be ending. Raises UserError where it does not.
    """
    with _as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + patience
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


def sweep(folder: Path) -> None:
    """Cleans up after killed processes that wrote in a folder: see `recover`, for all that is there."""
    for leftover in folder.glob(".*.*.*"):
        name, number, kind = leftover.name[1:].rsplit(".", 2)
        if not number.isdecimal() or kind not in _KINDS or _is_held(leftover):
            continue
        if leftover.is_dir():
            recover(folder / name)
        else:
            leftover.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Deletes a folder so that it is never there in part under its name."""
    gone, _ = _beside(folder)
    with _locked(folder):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _beside(target: Path) -> tuple[Path, Path]:
    """Names for what becomes `target`, and for what was there; no other process, on any machine, has the same."""
    number = secrets.randbelow(10**9)
    return target.parent / f".{target.name}.{number}.tmp", target.parent / f".{target.name}.{number}.old"


@contextmanager
def _made(path: Path, is_folder: bool) -> Iterator[None]:
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


def _is_held(leftover: Path) -> bool:
    """Whether a process, here or on another machine, is at work on it. Where nobody can tell, the user is told."""
    try:
        if leftover.suffix == ".new" and time.time() - leftover.stat().st_mtime < _SKEW:  # it is about to be locked
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


def probe_writable(folder: Path) -> None:
    """Makes the folder and a file in it, so that a run learns before it starts that it cannot save."""
    try:
        with new_file(folder / "probe") as temporary:
            temporary.write_bytes(b"")
    finally:
        with suppress(OSError):
            (folder / "probe").unlink(missing_ok=True)


def sync(path: Path) -> None:
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
            full = shutil.disk_usage(_existing(target)).free < _FULL
            if full or "No space left" in str(error):
                raise as_user_error(OSError(errno.ENOSPC, ""), target) from error
        raise


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def as_user_error(error: OSError, target: Path) -> UserError:
    """What an error of the system means for the user who wanted `target`."""
    if error.errno == errno.ENOSPC:
        return UserError(f"{target}: the disk is full; nothing was changed. Free some space and try again")
    if is_too_many_open(error):
        return too_many_open(target)
    if error.filename and not _is_of(error.filename, target):
        return UserError(f"{os.fsdecode(error.filename)}: cannot be read: {error.strerror}")
    return UserError(f"{target}: cannot be written: {error.strerror or error}")


def _is_of(path: str | bytes, target: Path) -> bool:
    """Whether a path is `target`, in it or above it, or what is beside it while it is written: see _beside."""
    place = Path(os.path.abspath(os.fsdecode(path)))
    is_temporary = str(place).startswith(str(target.parent / f".{target.name}."))
    return is_temporary or place.is_relative_to(target) or target.is_relative_to(place)
