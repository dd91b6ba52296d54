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

from fm9g.data.findings import Findings
from fm9g.data.index import DATA, INDEX, INDEX_H5, META
from fm9g.data.lines import BUCKETS, Bad, Lines, Part, Settings, convert_lines, convert_range, convert_records
from fm9g.data.readers import Record, records
from fm9g.data.records import parse_object, quote
from fm9g.data.scan import TOKENS_PER_UNIT
from fm9g.data.sources import Source, line_blocks
from fm9g.data.values import BadRecord
from fm9g.data.workers import check_workers, start_workers, stop_workers
from fm9g.errors import UserError
from fm9g.files import AppendedFile, new_folder
from fm9g.inputs import keep_inputs
from fm9g.kinds import DATASET, PART, kind_of
from fm9g.progress import Progress

REJECTS = "rejects.jsonl"
SPLITS = ("train", "validation")
_RANGE = 8 << 20  # bytes of a file that a process gets at a time
_RECORDS = 256  # as many of what is not read by lines
_AHEAD = 2  # parts a process may be ahead of the writing
_WORTH_WORKERS = 32 << 20  # bytes below which starting processes takes longer than the work
_SAMPLE_CHARACTERS = 50


@dataclass
class Report:
    """What an indexing found. metas: folder -> content of its meta.json. empty: records without output. rejected: bad
    records, left out. filtered: records in another language, left out."""

    sources: int = 0
    metas: dict[Path, dict[str, Any]] = field(default_factory=dict)
    shapes: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    blank: int = 0
    empty: int = 0
    rejected: int = 0
    filtered: int = 0


@keep_inputs()
def build_index(
    sources: list[Source], output: Path, settings: Settings, workers: int | None = None, overwrite: bool = False
) -> Report:
    """Checks every record of the sources and makes the indexed dataset `output` from them.

    With settings.split two datasets, output/train and output/validation. Bad records that settings.skip_bad lets pass
    are written to output/rejects.jsonl with file, line and reason. workers: processes beside this one; None: one a
    core where that pays. The folder appears under its name only when whole.
    Raises UserError for a bad record, for sources without any good one, and for an output folder that holds
    something (unless overwrite) or what is read.
    """
    if settings.language not in TOKENS_PER_UNIT:
        raise UserError(f"language: found {settings.language!r}, expected one of {', '.join(TOKENS_PER_UNIT)}")
    check_workers(workers)
    if settings.as_is and settings.language_filter:
        raise UserError("--language-filter does not go with --as-is: only a known shape tells what the prompt is")
    if not 0 <= settings.split < 1:
        raise UserError(f"split: found {settings.split}, expected a share from 0 to below 1")
    size = sum(source.size for source in sources)
    if workers is None:
        workers = min(os.cpu_count() or 1, 8) if size > _WORTH_WORKERS else 0
    for source in sources:
        source.note()
    report = Report(len(sources))
    names = SPLITS if settings.split else ("",)
    with new_folder(output, overwrite) as folder, ExitStack() as stack:
        writers = [stack.enter_context(_Writer(folder / name)) for name in names]
        run = _Run(settings, writers, report, folder / REJECTS, ahead=_AHEAD * workers)
        by_bytes = all(source.is_lines and source.is_seekable for source in sources)
        unit = "B" if by_bytes else "records"
        progress = stack.enter_context(Progress("indexing", size if by_bytes else None, unit))
        pool = start_workers(workers) if workers else None
        try:
            for source in sources:
                for amount in run.add(source, pool):
                    progress.advance(amount if by_bytes else run.read - progress.done)
        finally:
            if pool is not None:
                stop_workers(pool)
        for name, writer in zip(names, writers):
            if not writer.nlines:
                raise UserError(run.nothing(sources, name))
            meta = {"language": settings.language, **writer.finish(settings.language), "shapes": dict(report.shapes)}
            (folder / name / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
            report.metas[output / name] = meta
    return report


Task = tuple[Callable[..., Part], tuple[Any, ...], int]  # what to call with what, and how many bytes it reads


def _tasks(source: Source, settings: Settings) -> Iterator[Task]:
    text = source.format == "txt"
    if not source.is_lines:
        rest = records(source)
        while some := list(_some(rest)):
            yield convert_records, (some, settings), 0
    elif source.is_seekable:
        for start in range(0, source.size, _RANGE):
            end = min(start + _RANGE, source.size)
            yield convert_range, (source.path, start, end, text, settings), end - start
    else:
        for number, block in enumerate(line_blocks(source)):
            yield convert_lines, (block, number == 0, text, settings), 0


def _some(rest: Iterator[Record]) -> Iterator[Record]:
    """The next records: few where they are long."""
    size = 0
    for where, record in islice(rest, _RECORDS):
        yield where, record
        size += _characters(record)
        if size > _RANGE:
            return


def _characters(value: Any) -> int:
    """Of all texts in a value, but for the names of keys."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, BadRecord):
        return len(value.content)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, items))


def _in_order(tasks: Iterable[Task], pool: ProcessPoolExecutor | None, ahead: int) -> Iterator[tuple[Part, int]]:
    """Each task's result, and the bytes that it read. ahead: tasks that run while a result is used."""
    if pool is None:
        yield from ((call(*arguments), size) for call, arguments, size in tasks)
        return
    running: deque[tuple[Future[Part], int]] = deque()
    tasks = iter(tasks)
    try:
        while True:
            while len(running) < ahead and (task := next(tasks, None)):
                call, arguments, size = task
                running.append((pool.submit(call, *arguments), size))
            if not running:
                return
            future, size = running.popleft()
            yield future.result(), size
    except BrokenProcessPool:  # submit raises it, too
        raise UserError(
            "a process that checks records was killed (out of memory?); fewer --workers need less"
        ) from None


class _Run:
    """One indexing: what was read so far, and where it goes."""

    def __init__(self, settings: Settings, writers: list[_Writer], report: Report, rejects: Path, ahead: int) -> None:
        self._settings, self._writers, self._report = settings, writers, report
        self._rejects, self._ahead = rejects, ahead
        self._first_bad = ""
        self.read = 0

    def add(self, source: Source, pool: ProcessPoolExecutor | None) -> Iterator[int]:
        """Writes what a source holds; gives the bytes that were read, part by part."""
        read = 0  # of this source
        before = _stamp(source)
        parallel = pool if source.is_lines else None
        for part, size in _in_order(_tasks(source, self._settings), parallel, self._ahead):
            for bad in part.bad:
                self._reject(source, bad, read)
            for writer, lines in zip(self._writers, part.outputs):
                writer.add(lines, source.path)
                self._report.empty += lines.empty
            self._report.shapes += part.shapes
            self._report.findings.add(part.findings)
            self._report.blank += part.blank
            self._report.filtered += part.filtered
            read += part.read
            self.read += part.read
            yield size
        if _stamp(source) != before:
            raise UserError(f"{source}: was changed while it was read; let it be written to its end first")

    def _reject(self, source: Source, bad: Bad, read: int) -> None:
        message = _described(source, bad, read)
        if not self._settings.skip_bad:
            raise UserError(message)
        self._first_bad = self._first_bad or message
        self._report.rejected += 1
        content = bad.line.decode("utf-8", "replace")
        entry = {
            "file": os.fsencode(str(source)).decode("utf-8", "replace"),
            "where": _where(bad, read),
            "reason": bad.reason,
            "content": content,
        }
        with self._rejects.open("ab") as file:
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def nothing(self, sources: list[Source], name: str) -> str:
        """Why a dataset has no record."""
        if self._first_bad:
            return f"no record is good; the first: {self._first_bad}"
        if self._report.filtered and self._report.filtered + self._report.blank == self.read:
            language = self._settings.language_filter
            return f"language-filter: none of {self._report.filtered} records is in {language}"
        if name and self.read > self._report.blank:
            return f"split: no record of {self.read} fell into {name}; there are too few for this share"
        one = str(sources[0]) if len(sources) == 1 else f"{len(sources)} files"
        return f"{one}: nothing to index, no record in it"


def _stamp(source: Source) -> tuple[int, int] | None:
    """What changes when a file is written to."""
    if not source.is_file:
        return None
    status = os.stat(source.path)
    return status.st_size, status.st_mtime_ns


class _Writer:
    """The files of one indexed dataset, as they grow."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._files = folder, ExitStack()
        self._data = self._files.enter_context(AppendedFile(folder / DATA, 4 << 20))
        self._index = self._files.enter_context(AppendedFile(folder / INDEX))
        self._bounds_path = folder / "bounds"  # as in index.h5, whose size is not known before the end
        self._bounds = self._files.enter_context(AppendedFile(self._bounds_path))
        self._total = Lines()
        self.nlines = self.nbytes = 0
        self._add_bounds(np.zeros(1, np.int64))

    def add(self, lines: Lines, path: str) -> None:
        """path: the file that places among the chunks are in."""
        for chunk in lines.chunks:
            if isinstance(chunk, bytes):
                self._data.write(chunk)
            else:
                self._data.copy(path, *chunk)
        for lengths in lines.lengths:
            bounds = self.nbytes + np.cumsum(lengths)
            self._add_bounds(bounds)
            self.nlines, self.nbytes = self.nlines + len(bounds), int(bounds[-1])
        self._total.units += lines.units
        self._total.buckets += lines.buckets
        self._total.sample = self._total.sample or lines.sample

    def _add_bounds(self, bounds: np.ndarray) -> None:
        self._bounds.write(bounds.tobytes())
        numbers = orjson.dumps(bounds, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].replace(b",", b"\n")
        self._index.write(numbers + b"\n")

    def finish(self, language: str) -> dict[str, Any]:
        """Ends the files; returns what meta.json says of them."""
        self._files.close()
        with h5py.File(self._folder / INDEX_H5, "w") as file, self._bounds_path.open("rb") as bounds:
            dataset = file.create_dataset("index", (self.nlines + 1,), np.int64)
            for start in range(0, self.nlines + 1, 1 << 20):
                dataset[start : start + (1 << 20)] = np.fromfile(bounds, np.int64, 1 << 20)
        self._bounds_path.unlink()
        return {
            "nlines": self.nlines,
            "nbytes": self.nbytes,
            "length_distribute": dict(zip([*BUCKETS, "more_256k"], self._total.buckets.tolist())),
            "avg_token_per_line": self._total.units * TOKENS_PER_UNIT[language] / self.nlines,
            "data_sample": {key: _cut(value) for key, value in parse_object(self._total.sample).items()},
        }

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)


def _cut(value: Any, depth: int = 8) -> Any:
    """A value with its long strings and what is nested deeply cut."""
    if isinstance(value, list):
        return [_cut(item, depth - 1) for item in value] if depth else ["..."]
    if isinstance(value, dict):
        return {key: _cut(item, depth - 1) for key, item in value.items()} if depth else {"...": "..."}
    long = isinstance(value, str) and len(value) > _SAMPLE_CHARACTERS
    return value[:_SAMPLE_CHARACTERS] + "..." if long else value


def without_companions(sources: list[Source], paths: list[str]) -> list[Source]:
    """The sources but for what lies beside the data of indexed datasets: a dataset's records are its data.jsonl.

    paths: what was asked for; a file that is named itself is read.
    """
    return [source for source in sources if source.path in paths or not _is_companion(Path(source.path))]


def _is_companion(path: Path) -> bool:
    folders = [path.parent, *(path.parent / name for name in SPLITS)] if path.name == REJECTS else [path.parent]
    return path.name in (META, REJECTS) and any(map(_is_dataset, folders))


def _is_dataset(folder: Path) -> bool:
    """Also one whose index is lost, or whose meta.json is."""
    described = (folder / DATA).is_file() and kind_of(folder / META) == PART
    return described or kind_of(folder) == DATASET


def texts_of(sources: Iterable[Source], limit: int | None = None) -> Iterator[str]:
    """The texts that a tokenizer is trained on: what the records of the sources say.

    limit: bytes of records to take from each source. Raises UserError for a bad record.
    """
    settings = Settings("en")
    for source in sources:
        number = taken = 0
        for call, arguments, _ in _tasks(source, settings):
            part = call(*arguments)
            for bad in part.bad:
                raise UserError(_described(source, bad, number))
            number += part.read
            for chunk in part.outputs[0].chunks:
                data = chunk if isinstance(chunk, bytes) else _read(source.path, *chunk)
                for line in data.removesuffix(b"\n").split(b"\n"):
                    yield from _strings(parse_object(line))
                taken += len(data)
            if limit is not None and taken >= limit:
                break


def _read(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def _strings(value: Any) -> Iterator[str]:
    """The texts in a canonical record; not the names of its roles, nor ids."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "type", "id", "tool_call_id"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _described(source: Source, bad: Bad, read: int) -> str:
    """A message about a bad record. read: lines of the source before its part."""
    return f"{source}, {_where(bad, read)}: {bad.reason}" + (f": {quote(bad.line)}" if bad.line else "")


def _where(bad: Bad, read: int) -> str:
    return f"line {read + bad.where}" if isinstance(bad.where, int) else bad.where
