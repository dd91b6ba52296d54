"""Making indexed datasets: records in, a folder with data.jsonl, index, index.h5 and meta.json out."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import orjson

from fm9g.data.load.indexed_dataset import DATA_FILE, INDEX_FILE, INDEX_H5_FILE, META_FILE
from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT
from fm9g.data.prepare.findings import Findings
from fm9g.data.prepare.index_worker import (
    BUCKETS,
    ChunkResult,
    IndexConfig,
    LineBatch,
    RejectedRecord,
    convert_lines,
    convert_range,
    convert_records,
)
from fm9g.data.prepare.readers import LocatedRecord, read_records
from fm9g.data.prepare.records import parse_object, quote
from fm9g.data.prepare.sources import DataSource, line_blocks
from fm9g.data.prepare.values import BadRecord
from fm9g.data.workers import check_workers, start_workers, stop_workers
from fm9g.errors import UserError
from fm9g.io.atomic import AppendWriter, atomic_dir
from fm9g.io.inputs import protect_inputs
from fm9g.io.path_kind import DATASET, DATASET_PART, kind_of
from fm9g.progress import Progress

REJECTS_FILE = "rejects.jsonl"
SPLITS = ("train", "validation")
_CHUNK_BYTES = 8 << 20  # bytes of a file that a process gets at a time
_CHUNK_RECORDS = 256  # as many of what is not read by lines
_PREFETCH = 2  # parts a process may be ahead of the writing
_MIN_BYTES_FOR_WORKERS = 32 << 20  # bytes below which starting processes takes longer than the work
_MAX_SAMPLE_CHARACTERS = 50


@dataclass
class IndexReport:
    """What an indexing found. metas: folder -> content of its meta.json. empty: records without output. rejected: bad
    records, left out. filtered: records in another language, left out."""

    sources: int = 0
    metas: dict[Path, dict[str, Any]] = field(default_factory=dict)
    record_formats: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    blank: int = 0
    empty: int = 0
    rejected: int = 0
    filtered: int = 0


@protect_inputs()
def build_index(
    sources: list[DataSource], output: Path, config: IndexConfig, workers: int | None = None, overwrite: bool = False
) -> IndexReport:
    """Checks every record of the sources and makes the indexed dataset `output` from them.

    With config.split two datasets, output/train and output/validation. Bad records that config.skip_bad lets pass
    are written to output/rejects.jsonl with file, line and reason. workers: processes beside this one; None: one a
    core where that pays. The folder appears under its name only when whole.
    Raises UserError for a bad record, for sources without any good one, and for an output folder that holds
    something (unless overwrite) or what is read.
    """
    if config.language not in TOKENS_PER_UNIT:
        raise UserError(f"language: found {config.language!r}, expected one of {', '.join(TOKENS_PER_UNIT)}")
    check_workers(workers)
    if config.as_is and config.language_filter:
        raise UserError("--language-filter does not go with --as-is: only a known shape tells what the prompt is")
    if not 0 <= config.split < 1:
        raise UserError(f"split: found {config.split}, expected a share from 0 to below 1")
    size = sum(source.size for source in sources)
    if workers is None:
        workers = min(os.cpu_count() or 1, 8) if size > _MIN_BYTES_FOR_WORKERS else 0
    for source in sources:
        source.note()
    report = IndexReport(len(sources))
    names = SPLITS if config.split else ("",)
    with atomic_dir(output, overwrite) as folder, ExitStack() as stack:
        writers = [stack.enter_context(_DatasetWriter(folder / name)) for name in names]
        job = _IndexJob(config, writers, report, folder / REJECTS_FILE, max_pending=_PREFETCH * workers)
        by_bytes = all(source.is_lines and source.is_seekable for source in sources)
        unit = "B" if by_bytes else "records"
        progress = stack.enter_context(Progress("indexing", size if by_bytes else None, unit))
        pool = start_workers(workers) if workers else None
        try:
            for source in sources:
                for amount in job.add(source, pool):
                    progress.advance(amount if by_bytes else job.read - progress.done)
        finally:
            if pool is not None:
                stop_workers(pool)
        for name, writer in zip(names, writers):
            if not writer.nlines:
                raise UserError(job.explain_empty(sources, name))
            meta = {
                "language": config.language,
                **writer.finish(config.language),
                "shapes": dict(report.record_formats),
            }
            (folder / name / META_FILE).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
            report.metas[output / name] = meta
    return report


Task = tuple[Callable[..., ChunkResult], tuple[Any, ...], int]  # what to call with what, and how many bytes it reads


def _make_tasks(source: DataSource, config: IndexConfig) -> Iterator[Task]:
    is_text = source.format == "txt"
    if not source.is_lines:
        rest = read_records(source)
        while some := list(_next_chunk(rest)):
            yield convert_records, (some, config), 0
    elif source.is_seekable:
        for start in range(0, source.size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, source.size)
            yield convert_range, (source.path, start, end, is_text, config), end - start
    else:
        for number, block in enumerate(line_blocks(source)):
            yield convert_lines, (block, number == 0, is_text, config), 0


def _next_chunk(rest: Iterator[LocatedRecord]) -> Iterator[LocatedRecord]:
    """The next records: few where they are long."""
    size = 0
    for where, record in islice(rest, _CHUNK_RECORDS):
        yield where, record
        size += _count_characters(record)
        if size > _CHUNK_BYTES:
            return


def _count_characters(value: Any) -> int:
    """Of all texts in a value, but for the names of keys."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, BadRecord):
        return len(value.content)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_count_characters, items))


def _run_in_order(
    tasks: Iterable[Task], pool: ProcessPoolExecutor | None, max_pending: int
) -> Iterator[tuple[ChunkResult, int]]:
    """Each task's result, and the bytes that it read. max_pending: tasks that run while a result is used."""
    if pool is None:
        yield from ((call(*arguments), size) for call, arguments, size in tasks)
        return
    pending: deque[tuple[Future[ChunkResult], int]] = deque()
    tasks = iter(tasks)
    try:
        while True:
            while len(pending) < max_pending and (task := next(tasks, None)):
                call, arguments, size = task
                pending.append((pool.submit(call, *arguments), size))
            if not pending:
                return
            future, size = pending.popleft()
            yield future.result(), size
    except BrokenProcessPool:  # submit raises it, too
        raise UserError(
            "a process that checks records was killed (out of memory?); fewer --workers need less"
        ) from None


class _IndexJob:
    """One indexing: what was read so far, and where it goes."""

    def __init__(
        self, config: IndexConfig, writers: list[_DatasetWriter], report: IndexReport, rejects: Path, max_pending: int
    ) -> None:
        self._config, self._writers, self._report = config, writers, report
        self._rejects, self._max_pending = rejects, max_pending
        self._first_rejection = ""
        self.read = 0

    def add(self, source: DataSource, pool: ProcessPoolExecutor | None) -> Iterator[int]:
        """Writes what a source holds; gives the bytes that were read, part by part."""
        read = 0  # of this source
        before = _size_and_mtime(source)
        parallel = pool if source.is_lines else None
        for result, size in _run_in_order(_make_tasks(source, self._config), parallel, self._max_pending):
            for rejected in result.rejected:
                self._reject(source, rejected, read)
            for writer, lines in zip(self._writers, result.outputs):
                writer.add(lines, source.path)
                self._report.empty += lines.empty
            self._report.record_formats += result.record_formats
            self._report.findings.merge(result.findings)
            self._report.blank += result.blank
            self._report.filtered += result.filtered
            read += result.read
            self.read += result.read
            yield size
        if _size_and_mtime(source) != before:
            raise UserError(f"{source}: was changed while it was read; let it be written to its end first")

    def _reject(self, source: DataSource, rejected: RejectedRecord, read: int) -> None:
        message = _rejection_message(source, rejected, read)
        if not self._config.skip_bad:
            raise UserError(message)
        self._first_rejection = self._first_rejection or message
        self._report.rejected += 1
        content = rejected.line.decode("utf-8", "replace")
        entry = {
            "file": os.fsencode(str(source)).decode("utf-8", "replace"),
            "where": _location(rejected, read),
            "reason": rejected.reason,
            "content": content,
        }
        with self._rejects.open("ab") as file:
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def explain_empty(self, sources: list[DataSource], name: str) -> str:
        """Why a dataset has no record."""
        if self._first_rejection:
            return f"no record is good; the first: {self._first_rejection}"
        if self._report.filtered and self._report.filtered + self._report.blank == self.read:
            language = self._config.language_filter
            return f"language-filter: none of {self._report.filtered} records is in {language}"
        if name and self.read > self._report.blank:
            return f"split: no record of {self.read} fell into {name}; there are too few for this share"
        one = str(sources[0]) if len(sources) == 1 else f"{len(sources)} files"
        return f"{one}: nothing to index, no record in it"


def _size_and_mtime(source: DataSource) -> tuple[int, int] | None:
    """What changes when a file is written to."""
    if not source.is_file:
        return None
    status = os.stat(source.path)
    return status.st_size, status.st_mtime_ns


class _DatasetWriter:
    """The files of one indexed dataset, as they grow."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._files = folder, ExitStack()
        self._data = self._files.enter_context(AppendWriter(folder / DATA_FILE, 4 << 20))
        self._index = self._files.enter_context(AppendWriter(folder / INDEX_FILE))
        self._offsets_path = folder / "bounds"  # as in index.h5, whose size is not known before the end
        self._offsets = self._files.enter_context(AppendWriter(self._offsets_path))
        self._total = LineBatch()
        self.nlines = self.nbytes = 0
        self._add_offsets(np.zeros(1, np.int64))

    def add(self, batch: LineBatch, path: str) -> None:
        """path: the file that places among the chunks are in."""
        for chunk in batch.chunks:
            if isinstance(chunk, bytes):
                self._data.write(chunk)
            else:
                self._data.copy(path, *chunk)
        for lengths in batch.lengths:
            offsets = self.nbytes + np.cumsum(lengths)
            self._add_offsets(offsets)
            self.nlines, self.nbytes = self.nlines + len(offsets), int(offsets[-1])
        self._total.units += batch.units
        self._total.buckets += batch.buckets
        self._total.sample = self._total.sample or batch.sample

    def _add_offsets(self, offsets: np.ndarray) -> None:
        self._offsets.write(offsets.tobytes())
        numbers = orjson.dumps(offsets, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].replace(b",", b"\n")
        self._index.write(numbers + b"\n")

    def finish(self, language: str) -> dict[str, Any]:
        """Ends the files; returns what meta.json says of them."""
        self._files.close()
        with h5py.File(self._folder / INDEX_H5_FILE, "w") as file, self._offsets_path.open("rb") as offsets:
            dataset = file.create_dataset("index", (self.nlines + 1,), np.int64)
            for start in range(0, self.nlines + 1, 1 << 20):
                dataset[start : start + (1 << 20)] = np.fromfile(offsets, np.int64, 1 << 20)
        self._offsets_path.unlink()
        return {
            "nlines": self.nlines,
            "nbytes": self.nbytes,
            "length_distribute": dict(zip([*BUCKETS, "more_256k"], self._total.buckets.tolist())),
            "avg_token_per_line": self._total.units * TOKENS_PER_UNIT[language] / self.nlines,
            "data_sample": {key: _truncate(value) for key, value in parse_object(self._total.sample).items()},
        }

    def __enter__(self) -> _DatasetWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)


def _truncate(value: Any, depth: int = 8) -> Any:
    """A value with its long strings and what is nested deeply cut."""
    if isinstance(value, list):
        return [_truncate(item, depth - 1) for item in value] if depth else ["..."]
    if isinstance(value, dict):
        return {key: _truncate(item, depth - 1) for key, item in value.items()} if depth else {"...": "..."}
    long = isinstance(value, str) and len(value) > _MAX_SAMPLE_CHARACTERS
    return value[:_MAX_SAMPLE_CHARACTERS] + "..." if long else value


def drop_companion_files(sources: list[DataSource], paths: list[str]) -> list[DataSource]:
    """The sources but for what lies beside the data of indexed datasets: a dataset's records are its data.jsonl.

    paths: what was asked for; a file that is named itself is read.
    """
    return [source for source in sources if source.path in paths or not _is_companion(Path(source.path))]


def _is_companion(path: Path) -> bool:
    folders = [path.parent, *(path.parent / name for name in SPLITS)] if path.name == REJECTS_FILE else [path.parent]
    return path.name in (META_FILE, REJECTS_FILE) and any(map(_is_indexed_dataset, folders))


def _is_indexed_dataset(folder: Path) -> bool:
    """Also one whose index is lost, or whose meta.json is."""
    described = (folder / DATA_FILE).is_file() and kind_of(folder / META_FILE) == DATASET_PART
    return described or kind_of(folder) == DATASET


def iter_texts(sources: Iterable[DataSource], limit: int | None = None) -> Iterator[str]:
    """The texts that a tokenizer is trained on: what the records of the sources say.

    limit: bytes of records to take from each source. Raises UserError for a bad record.
    """
    config = IndexConfig("en")
    for source in sources:
        number = taken = 0
        for call, arguments, _ in _make_tasks(source, config):
            result = call(*arguments)
            for rejected in result.rejected:
                raise UserError(_rejection_message(source, rejected, number))
            number += result.read
            for chunk in result.outputs[0].chunks:
                data = chunk if isinstance(chunk, bytes) else _read_range(source.path, *chunk)
                for line in data.removesuffix(b"\n").split(b"\n"):
                    yield from _iter_strings(parse_object(line))
                taken += len(data)
            if limit is not None and taken >= limit:
                break


def _read_range(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def _iter_strings(value: Any) -> Iterator[str]:
    """The texts in a canonical record; not the names of its roles, nor ids."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "type", "id", "tool_call_id"):
                yield from _iter_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_strings(item)


def _rejection_message(source: DataSource, rejected: RejectedRecord, read: int) -> str:
    """A message about a bad record. read: lines of the source before its part."""
    return f"{source}, {_location(rejected, read)}: {rejected.reason}" + (
        f": {quote(rejected.line)}" if rejected.line else ""
    )


def _location(rejected: RejectedRecord, read: int) -> str:
    return f"line {read + rejected.where}" if isinstance(rejected.where, int) else rejected.where
