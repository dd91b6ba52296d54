"""Divides sources into chunks, and converts them here or in worker processes, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from fm9g.data.prepare.index_worker import IndexConfig, convert_lines, convert_range, convert_records
from fm9g.data.prepare.line_batch import ChunkResult, RejectedRecord
from fm9g.data.prepare.line_blocks import line_blocks
from fm9g.data.prepare.readers import read_records
from fm9g.data.prepare.sources import DataSource
from fm9g.data.prepare.values import BadRecord, LocatedRecord
from fm9g.errors import UserError

CHUNK_BYTES = 8 << 20  # bytes of a file in one task
_CHUNK_RECORDS = 256  # records in one task, for formats that are not read line by line
_PREFETCH = 2  # chunks per worker that are being converted or wait to be written


class _Task(NamedTuple):
    convert: Callable[..., ChunkResult]
    arguments: tuple[Any, ...]

    def run(self) -> ChunkResult:
        return self.convert(*self.arguments)


def convert_source(
    source: DataSource, config: IndexConfig, pool: ProcessPoolExecutor | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[ChunkResult]:
    """Converts a source chunk by chunk, in order.

    Args:
        pool: worker processes, used if the source is read line by line; None: convert in this process.
        chunk_bytes: bytes of a chunk.

    Raises UserError if the source cannot be read, or changes meanwhile.
    """
    before = _size_and_mtime(source)
    tasks = _make_tasks(source, config, chunk_bytes)
    first_line = 1  # of the chunk, in the source
    for result in _run_in_order(tasks, pool if source.is_lines else None):
        result.rejected = [_locate(rejected, first_line) for rejected in result.rejected]
        first_line += result.read
        yield result
    if _size_and_mtime(source) != before:
        raise UserError(f"{source}: was changed while it was being read; wait until it is completely written")


def _make_tasks(source: DataSource, config: IndexConfig, chunk_bytes: int) -> Iterator[_Task]:
    is_text = source.format == "txt"
    if not source.is_lines:
        rest = read_records(source)
        while records := list(_next_records(rest, chunk_bytes)):
            yield _Task(convert_records, (records, config))
    elif source.is_seekable:
        for start in range(0, source.size, chunk_bytes):
            yield _Task(convert_range, (source.path, start, min(start + chunk_bytes, source.size), is_text, config))
    else:
        with source.open() as stream:
            for number, block in enumerate(line_blocks(stream, source)):
                yield _Task(convert_lines, (block, number == 0, is_text, config))


def _next_records(rest: Iterator[LocatedRecord], chunk_bytes: int) -> Iterator[LocatedRecord]:
    """Yields the records of the next chunk, fewer if they are long."""
    size = 0
    for where, record in islice(rest, _CHUNK_RECORDS):
        yield where, record
        size += _count_characters(record)
        if size > chunk_bytes:
            return


def _count_characters(value: Any) -> int:
    """Characters of all texts in a value, without the keys."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, BadRecord):
        return len(value.content)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_count_characters, items))


def _run_in_order(tasks: Iterable[_Task], pool: ProcessPoolExecutor | None) -> Iterator[ChunkResult]:
    if pool is None:
        yield from (task.run() for task in tasks)
        return
    max_pending = _PREFETCH * pool._max_workers  # type: ignore[attr-defined]
    pending: deque[Future[ChunkResult]] = deque()
    tasks = iter(tasks)
    try:
        while True:
            while len(pending) < max_pending and (task := next(tasks, None)):
                pending.append(pool.submit(task.convert, *task.arguments))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:  # raised by submit, too
        raise UserError(
            "a worker process that checks records was killed; out of memory? Fewer --workers need less"
        ) from None


def _locate(rejected: RejectedRecord, first_line: int) -> RejectedRecord:
    """The record with its location in the source instead of in the chunk."""
    if isinstance(rejected.where, str):
        return rejected
    return replace(rejected, where=f"line {first_line + rejected.where - 1}")


def _size_and_mtime(source: DataSource) -> tuple[int, int] | None:
    """What changes if a file is written to."""
    if not source.is_file:
        return None
    status = os.stat(source.path)
    return status.st_size, status.st_mtime_ns
