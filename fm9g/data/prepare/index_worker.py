"""From what was read to lines of data.jsonl: a block at a time, so that many processes can share the work."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fm9g.data.prepare import sources
from fm9g.data.prepare.fast_scan import MARGIN, TOKENS_PER_UNIT, count_units, scan_pairs
from fm9g.data.prepare.findings import Findings, has_tools
from fm9g.data.prepare.language import is_in_language, prompt_of
from fm9g.data.prepare.readers import NUL_FOUND, LocatedRecord
from fm9g.data.prepare.record_formats import ColumnMapping, canonicalize
from fm9g.data.prepare.records import parse_record, to_line
from fm9g.data.prepare.sources import check_record_size
from fm9g.data.prepare.values import TOO_DEEP, BadRecord, check_storable
from fm9g.data.shuffle import splitmix64
from fm9g.errors import UserError

BUCKETS = {"less_4k": 4, "4k-8k": 8, "8k-16k": 16, "16k-32k": 32, "32k-64k": 64, "64k-128k": 128, "128k-256k": 256}
_BLOCK_BYTES = 512 << 10  # bytes that are looked at together: they stay in the processor's cache
_SPLIT_SALT = 4  # what a random number is for
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class IndexConfig:
    """How records are read.

    language: zh, en or code. columns: names of the keys, where they are not known ones. as_is: objects are kept as
    they are, whatever their keys. skip_bad: bad records are reported and left out, else the first ends the reading.
    split: the share of records that goes to a second dataset; seed: of that choice. language_filter: zh or en, which
    the prompts of the records must be in; empty: any.
    """

    language: str
    columns: ColumnMapping | None = None
    as_is: bool = False
    skip_bad: bool = False
    split: float = 0.0
    seed: int = 0
    language_filter: str = ""


@dataclass(frozen=True)
class RejectedRecord:
    """A record that cannot be used. where: its number among the lines of its part, or words."""

    where: int | str
    reason: str
    line: bytes


@dataclass
class LineBatch:
    """Lines for one data.jsonl. chunks: their bytes, or (start, end) in the file they are read from.

    lengths: bytes of each line. units: what the tokens are estimated from, in all; buckets: lines by estimated tokens.
    empty: records without output. sample: the first line.
    """

    chunks: list[bytes | tuple[int, int]] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    units: int = 0
    buckets: np.ndarray = field(default_factory=lambda: np.zeros(len(BUCKETS) + 1, np.int64))
    empty: int = 0
    sample: bytes = b""

    def add(
        self, chunk: bytes | tuple[int, int], block: np.ndarray, ends: np.ndarray, empty: int, language: str
    ) -> None:
        """block: the bytes of the chunk. ends: where its lines end."""
        found = count_units(block, ends, language)
        tokens = found * TOKENS_PER_UNIT[language]
        limits = [1024 * limit for limit in BUCKETS.values()]
        self.buckets += np.bincount(np.searchsorted(limits, tokens, side="right"), minlength=len(self.buckets))
        self.units += int(found.sum())
        self.lengths.append(np.diff(ends, prepend=0))
        self.empty += empty
        self.sample = self.sample or block[: ends[0]].tobytes()
        last = self.chunks[-1] if self.chunks else None
        if isinstance(chunk, tuple) and isinstance(last, tuple) and last[1] == chunk[0]:
            self.chunks[-1] = last[0], chunk[1]
        else:
            self.chunks.append(chunk)


@dataclass
class ChunkResult:
    """What became of a part of a source. read: its lines or records, blank ones included. outputs: one, or the two
    sides of a split. record_formats: records by shape. filtered: records in another language."""

    outputs: list[LineBatch]
    read: int = 0
    blank: int = 0
    filtered: int = 0
    record_formats: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    rejected: list[RejectedRecord] = field(default_factory=list)


def convert_range(path: str, start: int, end: int, is_text: bool, config: IndexConfig) -> ChunkResult:
    """The lines of a file that begin after byte `start` (at it, where that is 0), up to byte `end`.

    is_text: each is a record of plain text, else JSON.
    """
    result = _new_result(config)
    file = os.open(path, os.O_RDONLY)
    try:
        offset, stop = _next_line_start(file, start), _next_line_start(file, end)
        block = bytearray(_BLOCK_BYTES + 2 * MARGIN)
        while offset < stop and (config.skip_bad or not result.rejected):
            block, size = _read_lines(file, offset, stop, block, path)
            _convert_block(block, size, offset, offset == 0, is_text, config, result)
            offset += size
    finally:
        os.close(file)
    return result


def convert_lines(data: bytes, is_first: bool, is_text: bool, config: IndexConfig) -> ChunkResult:
    """The lines of a block that was read elsewhere. is_first: of its source."""
    result = _new_result(config)
    _convert_block(bytearray(MARGIN) + data + bytearray(MARGIN), len(data), 0, is_first, is_text, config, result)
    for lines in result.outputs:
        lines.chunks = [data[slice(*chunk)] if isinstance(chunk, tuple) else chunk for chunk in lines.chunks]
    return result


def convert_records(records: list[LocatedRecord], config: IndexConfig) -> ChunkResult:
    """Records that were parsed elsewhere."""
    result = _new_result(config)
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


def _new_result(config: IndexConfig) -> ChunkResult:
    return ChunkResult([LineBatch() for _ in range(2 if config.split else 1)])


def _next_line_start(file: int, offset: int) -> int:
    """Where the line after that at `offset` begins; 0 for 0."""
    if offset == 0:
        return 0
    while chunk := os.pread(file, 1 << 16, offset):
        found = chunk.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(chunk)
    return offset


def _read_lines(file: int, start: int, stop: int, block: bytearray, path: str) -> tuple[bytearray, int]:
    """The next whole lines, in the block or, where it is too small, in a larger one; and their size."""
    size = _BLOCK_BYTES
    while True:
        size = min(size, stop - start)
        if len(block) < size + 2 * MARGIN:
            check_record_size(size, path)
            block = bytearray(size + 2 * MARGIN)
        with memoryview(block) as view:
            count = os.preadv(file, [view[MARGIN : MARGIN + size]], start)
        if not count:
            raise UserError(f"{path}: became shorter while it was read; let it be written to its end first")
        if start + count == stop:
            return block, count
        last = block.rfind(b"\n", MARGIN, MARGIN + count)
        if last >= 0:
            return block, last + 1 - MARGIN
        size *= 4


def _convert_block(
    block: bytearray, size: int, offset: int, is_first: bool, is_text: bool, config: IndexConfig, result: ChunkResult
) -> None:
    """The lines block[MARGIN : MARGIN + size], which are at `offset` of their file."""
    by_record = is_text or config.split or config.as_is or config.columns or config.language_filter
    if not by_record and (found := scan_pairs(block, size)):
        ends, empty = found
        lines = np.frombuffer(block, np.uint8)[MARGIN : MARGIN + size]
        result.outputs[0].add((offset, offset + size), lines, ends, empty, config.language)
        result.record_formats["input/output"] += len(ends)
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
    collector.finish((offset, data))


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
    """Records one by one, until they are added to the part as a block."""

    def __init__(self, config: IndexConfig, result: ChunkResult) -> None:
        self._config, self._result = config, result
        self._lines: list[list[bytes]] = [[] for _ in result.outputs]
        self._empty = [0 for _ in result.outputs]

    def add(self, record: dict[str, Any], line: bytes | None = None) -> None:
        """line: the record as it was read, kept where it is in canonical form. Raises BadRecord."""
        config = self._config
        dropped_keys: list[str] = []
        try:
            record_format, kept = (
                ("as it is", record) if config.as_is else canonicalize(record, config.columns, dropped_keys)
            )
        except RecursionError:
            raise BadRecord(TOO_DEEP) from None
        if config.language_filter and not is_in_language(prompt_of(kept), config.language_filter):
            self._result.filtered += 1
            return
        # JSON's lines hold no number that is not finite; and pairs are of strings.
        if (line is None and config.as_is) or ("messages" in kept and (line is None or has_tools(kept))):
            check_storable(kept)
        stored = to_line(kept) if line is None or kept is not record else line + b"\n"
        if len(stored) > sources.MAX_RECORD_BYTES:
            raise BadRecord(f"longer than {sources.MAX_RECORD_BYTES >> 20} MB, which no record is; divide it")
        output_index = int(
            bool(config.split) and splitmix64(config.seed, _SPLIT_SALT, zlib.crc32(stored)) < config.split * 2**64
        )
        self._lines[output_index].append(stored)
        self._empty[output_index] += kept.get("output", True) == ""
        self._result.record_formats[record_format] += 1
        if not config.as_is:
            self._result.findings.observe(kept, dropped_keys)

    def finish(self, source: tuple[int, bytes] = (0, b"")) -> None:
        """source: place and content of the block the records are from; lines that equal it need not be copied."""
        for output_index, lines in enumerate(self._lines):
            if lines:
                data = b"".join(lines)
                offset, unchanged = source[0], data == source[1]
                self._result.outputs[output_index].add(
                    (offset, offset + len(data)) if unchanged else data,
                    np.frombuffer(data, np.uint8),
                    np.cumsum([len(line) for line in lines]),
                    self._empty[output_index],
                    self._config.language,
                )
