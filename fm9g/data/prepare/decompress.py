"""Files as streams of decompressed bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Any

from fm9g.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")  # suffixes of file names
STDIN = "-"
CHUNK_BYTES = 1 << 20  # bytes of one read
XZ_MEMORY_BYTES = 256 << 20  # `xz -9` needs 65 MB for reading, but a file may ask for 4 GB


@contextmanager
def open_decompressed(
    path: str, compression: str = "", *, xz_memory_bytes: int = XZ_MEMORY_BYTES
) -> Iterator[IO[bytes]]:
    """Opens a file, or stdin, and decompresses it while it is read.

    Args:
        path: "-" is stdin.
        compression: one of COMPRESSIONS, or empty.
        xz_memory_bytes: a .xz file that needs more is refused.

    Raises UserError for a file that cannot be opened or decompressed, also while it is read.
    """
    name = "stdin" if path == STDIN else path
    try:
        if path == STDIN:
            yield sys.stdin.buffer
            return
        with open(path, "rb") as file, _decompressing(file, compression, xz_memory_bytes) as stream:
            yield stream
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None
        raise UserError(f"{name}: cannot be decompressed; is the file complete? {error}") from None


def _decompressing(file: IO[bytes], compression: str, xz_memory_bytes: int) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".bz2":
        return io.BufferedReader(_ConcatReader(file, bz2.BZ2Decompressor), CHUNK_BYTES)
    if compression == ".xz":
        reader = _ConcatReader(file, lambda: lzma.LZMADecompressor(memlimit=xz_memory_bytes))
        return io.BufferedReader(reader, CHUNK_BYTES)
    if compression == ".zst":
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd", buffer_size=CHUNK_BYTES)
    return nullcontext(file)


class _ConcatReader(io.RawIOBase):
    """The content of compressed streams, one after the other.

    Python's own readers take damage at the beginning of a later stream for the end of the file.
    """

    def __init__(self, file: IO[bytes], make_decompressor: Callable[[], Any]) -> None:
        self._file, self._make_decompressor = file, make_decompressor
        self._decompressor, self._pending = make_decompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                # A file of xz may be padded with zeros.
                self._pending = (self._decompressor.unused_data or self._file.read(CHUNK_BYTES)).lstrip(b"\0")
                if not self._pending:
                    return 0
                self._decompressor = self._make_decompressor()
            if self._decompressor.needs_input and not self._pending:
                self._pending = self._file.read(CHUNK_BYTES)
                if not self._pending:
                    raise EOFError("it ends in the middle")
            data = self._decompressor.decompress(self._pending, len(buffer))
            self._pending = b""
            if data:
                buffer[: len(data)] = data
                return len(data)
