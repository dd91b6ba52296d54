"""Files that are read at arbitrary offsets, of which a process keeps only some open."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.open_files import is_too_many_open_files

_MAX_OPEN = 256


def stat_signature(status: os.stat_result) -> tuple[int, ...]:
    """Identifies a file and its version: the value changes if the file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class RandomAccessFile:
    """A file that is read at arbitrary offsets.

    A mixture may have more datasets than a process may have open files. So all instances of a process share a pool of
    open descriptors, the most recently read ones: at most 256, and at most a quarter of the limit on open files.
    """

    _descriptors: ClassVar[OrderedDict[RandomAccessFile, int]] = OrderedDict()  # least recently read first
    # Reentrant: garbage collection may close one file while another is being opened.
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._signature = stat_signature(path.stat())
        register_input(path)

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`. Raises UserError if the file was changed or replaced."""
        with self._lock:
            descriptor = self._descriptor()
            data = os.pread(descriptor, size, offset)
            if stat_signature(os.fstat(descriptor)) != self._signature:
                raise UserError(f"{self._path}: was changed or replaced while it was read; start again")
            return data

    def close(self) -> None:
        with self._lock:
            if self in self._descriptors:
                os.close(self._descriptors.pop(self))

    def _descriptor(self) -> int:
        if self in self._descriptors:
            self._descriptors.move_to_end(self)
            return self._descriptors[self]
        max_open = min(_MAX_OPEN, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        while len(self._descriptors) >= max_open:
            self._close_oldest()
        while True:
            try:
                descriptor = os.open(self._path, os.O_RDONLY)
                break
            except OSError as error:
                if not is_too_many_open_files(error):
                    raise UserError(f"{self._path}: {error.strerror}; it was being read") from None
                if not self._descriptors:
                    raise
                self._close_oldest()
        self._descriptors[self] = descriptor
        return descriptor

    @classmethod
    def _close_oldest(cls) -> None:
        os.close(cls._descriptors.popitem(last=False)[1])
