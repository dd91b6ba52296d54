"""Blocks of complete lines, from a stream or from a byte range of a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, Any

from fm9g.data.prepare.decompress import CHUNK_BYTES
from fm9g.data.prepare.fast_scan import MARGIN
from fm9g.data.prepare.record_size import check_record_size
from fm9g.io.os_errors import truncated_error

BLOCK_BYTES = 512 << 10  # bytes of a block of a byte range: it stays in the processor's cache


def line_blocks(stream: IO[bytes], source: Any) -> Iterator[bytes]:
    """Yields the bytes of a stream in blocks of complete lines. Raises UserError for an endless line."""
    rest = b""
    while chunk := stream.read(max(CHUNK_BYTES, len(rest))):
        complete, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield rest + complete + newline
            rest = tail
        else:
            rest += chunk
            check_record_size(len(rest), source)
    if rest:
        yield rest


def next_line_start(file: int, offset: int) -> int:
    """The offset of the first line that starts after byte `offset`; 0 for 0. file: a descriptor."""
    if offset == 0:
        return 0
    while chunk := os.pread(file, 1 << 16, offset):
        newline = chunk.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(chunk)
    return offset


def new_block() -> bytearray:
    """An empty block for `read_lines`, with a margin of MARGIN bytes on either side."""
    return bytearray(BLOCK_BYTES + 2 * MARGIN)


def read_lines(file: int, start: int, stop: int, block: bytearray, path: str) -> tuple[bytearray, int]:
    """Reads the next complete lines of a file into a block, or into a larger one if the first line does not fit.

    Args:
        file: a descriptor.
        start: offset of the first line.
        stop: offset of the end of the last line that may be read.

    Returns the block and the number of bytes in it, from MARGIN on.
    """
    size = BLOCK_BYTES
    while True:
        size = min(size, stop - start)
        if len(block) < size + 2 * MARGIN:
            check_record_size(size, path)
            block = bytearray(size + 2 * MARGIN)
        with memoryview(block) as view:
            count = os.preadv(file, [view[MARGIN : MARGIN + size]], start)
        if not count:
            raise truncated_error(path)
        if start + count == stop:
            return block, count
        last = block.rfind(b"\n", MARGIN, MARGIN + count)
        if last >= 0:
            return block, last + 1 - MARGIN
        size *= 4
