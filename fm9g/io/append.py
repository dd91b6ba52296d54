"""A file that grows at its end, from memory and from other files, as cheaply as the system allows.

Data from memory bypasses the page cache where the file system supports O_DIRECT. It must reach the disk before it
counts, so the cache is only a detour, and an expensive one where new memory is slow to get.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

from fm9g.io.os_errors import truncated_error

_COPY_BYTES = 1 << 26  # bytes that the kernel copies from file to file at a time
_PAGE = 4096  # alignment, in file and memory, of writes that bypass the cache
# Errors of a system that cannot copy between two files in the kernel.
_COPY_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


class AppendWriter:
    """Appends bytes to a file. A context manager, which flushes if its block ends without an error.

        file:    |<-------- position -------->|
        buffer:               |     | waiting |  free  |
                              0   begin      end

    The waiting bytes start at the same offset within a page as they will in the file, so that all complete pages in
    the buffer can be written from aligned memory to an aligned offset.

    Attributes:
        position: bytes in the file. More bytes may wait in the buffer until `flush`.
    """

    def __init__(self, path: Path, start: int = 0, buffer_bytes: int = 1 << 19) -> None:
        """Opens or creates the file.

        Args:
            path: the file.
            start: bytes to keep of an existing file; the rest is cut off.
            buffer_bytes: bytes that are written at a time, a multiple of 4096.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._direct: int | None = None
        with suppress(OSError, AttributeError):
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        os.ftruncate(self._file, start)
        self.position = start
        self._buffer = memoryview(mmap.mmap(-1, buffer_bytes))
        self._begin = self._end = 0

    def write(self, data: memoryview | bytes) -> None:
        """Appends bytes from memory."""
        rest = memoryview(data)
        while rest:
            self._align()
            part = rest[: len(self._buffer) - self._end]
            self._buffer[self._end : self._end + len(part)] = part
            self._extend(len(part))
            rest = rest[len(part) :]

    def copy(self, source: Path | str, offset: int, nbytes: int, in_kernel: bool = True) -> None:
        """Appends a byte range of another file. Raises UserError if that file has become shorter.

        Args:
            source: the other file.
            offset: first byte to copy.
            nbytes: number of bytes.
            in_kernel: let the kernel copy, through the page cache; else copy through this writer's buffer, which is
                better for many small ranges.
        """
        if in_kernel:
            self.flush()
        file = os.open(source, os.O_RDONLY)
        try:
            while nbytes:
                if in_kernel:
                    count = _copy_range(file, self._file, offset, self.position, min(nbytes, _COPY_BYTES))
                    self._advance(count)
                else:
                    self._align()
                    count = os.preadv(file, [self._buffer[self._end : self._end + nbytes]], offset)
                    self._extend(count)
                if not count:
                    raise truncated_error(source)
                offset, nbytes = offset + count, nbytes - count
        finally:
            os.close(file)

    def flush(self) -> None:
        """Writes the waiting bytes into the file."""
        self._write_pages()
        self._pwrite(self._end, self._file)

    def fdatasync(self) -> None:
        """Returns when the bytes in the file are on the disk. Another thread may call it."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Closes the file without flushing."""
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)

    def __enter__(self) -> AppendWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _advance(self, count: int) -> None:
        """Called after `count` more bytes are in the file."""
        self.position += count

    def _align(self) -> None:
        """Moves an empty buffer's start to the offset within a page where the file ends."""
        if self._begin == self._end:
            self._begin = self._end = self.position % _PAGE

    def _extend(self, count: int) -> None:
        """Counts bytes that were put into the buffer, and writes when it is full."""
        self._end += count
        if self._end == len(self._buffer):
            self._write_pages()

    def _write_pages(self) -> None:
        """Writes up to the last page boundary; the rest keeps waiting."""
        self._pwrite(min(self._end, self._begin + -self._begin % _PAGE), self._file)
        self._pwrite(self._end - self._end % _PAGE, self._file if self._direct is None else self._direct)
        rest = bytes(self._buffer[self._begin : self._end])
        self._begin = self.position % _PAGE
        self._end = self._begin + len(rest)
        self._buffer[self._begin : self._end] = rest

    def _pwrite(self, end: int, file: int) -> None:
        """Writes the buffer's bytes before `end`."""
        while self._begin < end:
            try:
                count = os.pwrite(file, self._buffer[self._begin : end], self.position)
            except OSError as error:
                if file == self._file or error.errno != errno.EINVAL:
                    raise
                file = self._file  # the file system accepted O_DIRECT when opening but not when writing
                continue
            if count % _PAGE:
                file = self._file
            self._begin += count
            self._advance(count)


def _copy_range(source: int, target: int, offset: int, end: int, count: int) -> int:
    """Copies up to `count` bytes at `offset` to `end` in the kernel; returns how many."""
    try:
        return os.copy_file_range(source, target, count, offset, end)
    except OSError as error:
        if error.errno not in _COPY_UNSUPPORTED:
            raise
    os.lseek(target, end, os.SEEK_SET)
    return os.sendfile(target, source, offset, count)
