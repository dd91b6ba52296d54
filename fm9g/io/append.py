"""A file that grows at its end, from memory and from other files, by the ways that cost the system least.

Bytes of other files are copied by the system alone. What comes from memory goes past the cache where the file system
allows that: it has to reach the disk before it counts, and pages of the cache are dear where memory is slow to come by.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

from fm9g.errors import UserError

_BUFFER_BYTES = 1 << 22  # bytes from memory that are written at a time
_COPY_BYTES = 1 << 26  # bytes that are copied from file to file at a time
_PAGE = 4096  # alignment, in file and memory, of what goes past the cache
# What a system says that cannot copy between two files by itself.
_COPY_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


class ResumableAppendWriter:
    """position: bytes that the file has; more may wait in a buffer until `flush`."""

    def __init__(self, path: Path, start: int) -> None:
        """start: bytes that are there; what is behind them is cut off."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._direct: int | None = None
        with suppress(OSError, AttributeError):
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        os.ftruncate(self._file, start)
        self.position = start
        # What waits is at [begin, end), as far from the begin of a page as it will be in the file.
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        self._begin = self._end = 0

    def write(self, data: memoryview | bytes) -> None:
        """Appends bytes."""
        rest = memoryview(data)
        while rest:
            if self._begin == self._end:
                self._begin = self._end = self.position % _PAGE
            part = rest[: len(self._buffer) - self._end]
            self._buffer[self._end : self._end + len(part)] = part
            self._end += len(part)
            rest = rest[len(part) :]
            if self._end == len(self._buffer):
                self._write_pages()

    def copy(self, source: Path, offset: int, nbytes: int) -> None:
        """Appends bytes of another file. Raises UserError where it has become shorter."""
        self.flush()
        file = os.open(source, os.O_RDONLY)
        try:
            while nbytes:
                count = _copy_range(file, self._file, offset, self.position, min(nbytes, _COPY_BYTES))
                if not count:
                    raise UserError(f"{source}: became shorter while it was read; let it be written to its end first")
                offset, nbytes = offset + count, nbytes - count
                self._advance(count)
        finally:
            os.close(file)

    def flush(self) -> None:
        """Empties the buffer into the file."""
        self._write_pages()
        self._pwrite(self._end, self._file)

    def fdatasync(self) -> None:
        """Returns when what the file has is on the disk; may be called by another thread."""
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def _advance(self, count: int) -> None:
        """Is told of bytes that the file has got."""
        self.position += count

    def _write_pages(self) -> None:
        """Writes what is before the first whole page of the file, and the whole pages; the rest stays."""
        self._pwrite(min(self._end, self._begin + -self._begin % _PAGE), self._file)
        self._pwrite(self._end - self._end % _PAGE, self._file if self._direct is None else self._direct)
        rest = bytes(self._buffer[self._begin : self._end])
        self._begin = self.position % _PAGE
        self._end = self._begin + len(rest)
        self._buffer[self._begin : self._end] = rest

    def _pwrite(self, end: int, file: int) -> None:
        """Writes what the buffer has up to `end`."""
        while self._begin < end:
            try:
                count = os.pwrite(file, self._buffer[self._begin : end], self.position)
            except OSError as error:
                if file == self._file or error.errno != errno.EINVAL:
                    raise
                file = self._file  # a file system that promises more than it does
                continue
            if count % _PAGE:
                file = self._file
            self._begin += count
            self._advance(count)


def _copy_range(source: int, target: int, offset: int, end: int, count: int) -> int:
    """Copies bytes from `offset` on to `end`, as many as the system likes; returns how many."""
    try:
        return os.copy_file_range(source, target, count, offset, end)
    except OSError as error:
        if error.errno not in _COPY_UNSUPPORTED:
            raise
    os.lseek(target, end, os.SEEK_SET)
    return os.sendfile(target, source, offset, count)
