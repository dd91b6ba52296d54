"""Converts a chunk of a source to lines of data.jsonl: a pure function, so that many processes can share the work."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm9g.data.dataset_files import AS_IS
from fm9g.data.prepare import record_size
from fm9g.data.prepare.column_mapping import ColumnMapping
from fm9g.data.prepare.fast_scan import MARGIN, scan_pairs
from fm9g.data.prepare.findings import has_tools
from fm9g.data.prepare.language import is_in_language, prompt_of
from fm9g.data.prepare.line_batch import ChunkResult, LineBatch, RejectedRecord
from fm9g.data.prepare.line_blocks import new_block, next_line_start, read_lines
from fm9g.data.prepare.record_formats import PAIR_FORMAT, canonicalize
from fm9g.data.prepare.records import parse_record, to_line
from fm9g.data.prepare.values import NUL_FOUND, TOO_DEEP, BadRecord, LocatedRecord, check_storable
from fm9g.data.shuffle import splitmix64

_SPLIT_SALT = 4  # separates the random numbers of a split from those of other uses
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class IndexConfig:
    """How records are read.

    Args:
        language: zh, en or code: how tokens are estimated.
        columns: which of the user's keys holds what; None: recognized by their names.
        as_is: store objects with any keys, unchecked.
        skip_bad: leave bad records out; otherwise the first one ends the indexing.
        split: share of the records, from 0 to 1, that goes to a second dataset.
        seed: of the split.
        language_filter: zh or en: keep only records whose prompt is in it; empty: keep all.
    """

    language: str
    columns: ColumnMapping | None = None
    as_is: bool = False
    skip_bad: bool = False
    split: float = 0.0
    seed: int = 0
    language_filter: str = ""

    def new_result(self) -> ChunkResult:
        return ChunkResult([LineBatch() for _ in range(2 if self.split else 1)])


def convert_range(path: str, start: int, end: int, is_text: bool, config: IndexConfig) -> ChunkResult:
    """Converts the lines of a file that start after byte `start`, or at byte 0, up to byte `end`.

    is_text: each line is a record of plain text; otherwise JSON.
    """
    result = config.new_result()
    result.num_bytes = end - start
    file = os.open(path, os.O_RDONLY)
    try:
        offset, stop = next_line_start(file, start), next_line_start(file, end)
        block = new_block()
        while offset < stop and (config.skip_bad or not result.rejected):
            block, size = read_lines(file, offset, stop, block, path)
            _convert_block(block, size, offset, offset == 0, is_text, config, result)
            offset += size
    finally:
        os.close(file)
    return result


def convert_lines(data: bytes, is_first: bool, is_text: bool, config: IndexConfig) -> ChunkResult:
    """Converts a block of lines. is_first: it is the beginning of its source."""
    result = config.new_result()
    _convert_block(bytearray(MARGIN) + data + bytearray(MARGIN), len(data), 0, is_first, is_text, config, result)
    for batch in result.outputs:  # offsets in `data` mean nothing to the caller
        batch.chunks = [data[slice(*chunk)] if isinstance(chunk, tuple) else chunk for chunk in batch.chunks]
    return result


def convert_records(records: list[LocatedRecord], config: IndexConfig) -> ChunkResult:
    """Converts records that a reader has parsed."""
    result = config.new_result()
    collector = _LineCollector(config, result)
    for where, record in records:
        result.read += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            collector.add(record)
        except BadRecord as error:
            content = error.content if isinstance(record, BadRecord) else _dump_record(record)
            result.rejected.append(RejectedRecord(where, str(error), content.encode("utf-8", "replace")))
            if not config.skip_bad:
                break
    collector.finish()
    return result


def _convert_block(
    block: bytearray, size: int, offset: int, is_first: bool, is_text: bool, config: IndexConfig, result: ChunkResult
) -> None:
    """Converts the lines block[MARGIN : MARGIN + size], which start at byte `offset` of their file."""
    by_record = is_text or config.split or config.as_is or config.columns or config.language_filter
    if not by_record and (pairs := scan_pairs(block, size)):
        ends, empty = pairs
        lines = np.frombuffer(block, np.uint8)[MARGIN : MARGIN + size]
        result.outputs[0].add((offset, offset + size), lines, ends, empty, config.language)
        result.record_formats[PAIR_FORMAT] += len(ends)
        result.read += len(ends)
        return
    data = bytes(memoryview(block)[MARGIN : MARGIN + size])
    if is_text:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    collector = _LineCollector(config, result)
    for line in (data.removeprefix(_BOM) if is_first else data).removesuffix(b"\n").split(b"\n"):
        result.read += 1
        stripped = line.strip()
        if not stripped:
            result.blank += 1
            continue
        try:
            if is_text:
                collector.add({"input": "", "output": _decode_text(stripped)})
            else:
                collector.add(parse_record(stripped), stripped)
        except BadRecord as error:
            result.rejected.append(RejectedRecord(result.read, str(error), line))
            if not config.skip_bad:
                break
    collector.finish(data, offset)


def _decode_text(line: bytes) -> str:
    if b"\0" in line:
        raise BadRecord(NUL_FOUND)
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8: {error.reason}; convert the file, with iconv for example") from None


def _dump_record(record: dict[str, Any]) -> str:
    """A bad record as text."""
    try:
        return json.dumps(record, ensure_ascii=False, default=str)
    except (ValueError, RecursionError) as error:
        return f"a record with the keys {', '.join(record)} that cannot be written: {error}"


class _LineCollector:
    """Collects the lines of records, and adds them to the result as one block."""

    def __init__(self, config: IndexConfig, result: ChunkResult) -> None:
        self._config, self._result = config, result
        self._lines: list[list[bytes]] = [[] for _ in result.outputs]
        self._empty = [0 for _ in result.outputs]

    def add(self, record: dict[str, Any], line: bytes | None = None) -> None:
        """line: the JSON of the record, which is stored unchanged if it is canonical. Raises BadRecord."""
        config = self._config
        dropped_keys: list[str] = []
        try:
            record_format, canonical = (
                (AS_IS, record) if config.as_is else canonicalize(record, config.columns, dropped_keys)
            )
        except RecursionError:
            raise BadRecord(TOO_DEEP) from None
        if config.language_filter and not is_in_language(prompt_of(canonical), config.language_filter):
            self._result.filtered += 1
            return
        # Lines of JSON hold no number that is not finite, and pairs hold strings only.
        if (line is None and config.as_is) or ("messages" in canonical and (line is None or has_tools(canonical))):
            check_storable(canonical)
        stored = to_line(canonical) if line is None or canonical is not record else line + b"\n"
        if len(stored) > record_size.MAX_RECORD_BYTES:
            raise BadRecord(f"longer than {record_size.MAX_RECORD_BYTES >> 20} MB, the limit of a record; divide it")
        output = self._output_of(stored)
        self._lines[output].append(stored)
        self._empty[output] += canonical.get("output", True) == ""
        self._result.record_formats[record_format] += 1
        if not config.as_is:
            self._result.findings.observe(canonical, dropped_keys)

    def _output_of(self, line: bytes) -> int:
        """Which dataset of a split a line belongs to: equal lines go to the same one."""
        split = self._config.split
        return int(bool(split) and splitmix64(self._config.seed, _SPLIT_SALT, zlib.crc32(line)) < split * 2**64)

    def finish(self, source: bytes = b"", offset: int = 0) -> None:
        """source: the block that the records come from, at byte `offset` of its file.

        If the lines equal the block, they are copied from file to file, and not returned by the worker.
        """
        for batch, lines, empty in zip(self._result.outputs, self._lines, self._empty):
            if lines:
                data = b"".join(lines)
                chunk = (offset, offset + len(data)) if data == source else data
                ends = np.cumsum([len(line) for line in lines])
                batch.add(chunk, np.frombuffer(data, np.uint8), ends, empty, self._config.language)
