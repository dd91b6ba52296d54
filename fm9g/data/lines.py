"""From what was read to lines of data.jsonl: a block at a time, so that many processes can share the work."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fm9g.data import sources
from fm9g.data.findings import Findings, has_tools
from fm9g.data.language import is_in_language, prompt_of
from fm9g.data.order import mix
from fm9g.data.readers import NUL, Record
from fm9g.data.records import parse_record, to_line
from fm9g.data.scan import MARGIN, TOKENS_PER_UNIT, plain_pairs, units
from fm9g.data.shapes import Columns, canonical
from fm9g.data.sources import check_record_size
from fm9g.data.values import TOO_DEEP, BadRecord, check_storable
from fm9g.errors import UserError

BUCKETS = {"less_4k": 4, "4k-8k": 8, "8k-16k": 16, "16k-32k": 32, "32k-64k": 64, "64k-128k": 128, "128k-256k": 256}
_BLOCK = 512 << 10  # bytes that are looked at together: they stay in the processor's cache
_SPLIT = 4  # what a random number is for
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Settings:
    """How records are read.

    language: zh, en or code. columns: names of the keys, where they are not known ones. as_is: objects are kept as
    they are, whatever their keys. skip_bad: bad records are reported and left out, else the first ends the reading.
    split: the share of records that goes to a second dataset; seed: of that choice. language_filter: zh or en, which
    the prompts of the records must be in; empty: any.
    """

    language: str
    columns: Columns | None = None
    as_is: bool = False
    skip_bad: bool = False
    split: float = 0.0
    seed: int = 0
    language_filter: str = ""


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used. where: its number among the lines of its part, or words."""

    where: int | str
    reason: str
    line: bytes


@dataclass
class Lines:
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
        found = units(block, ends, language)
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
class Part:
    """What became of a part of a source. read: its lines or records, blank ones included. outputs: one, or the two
    sides of a split. shapes: records by shape. filtered: records in another language."""

    outputs: list[Lines]
    read: int = 0
    blank: int = 0
    filtered: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    bad: list[Bad] = field(default_factory=list)


def convert_range(path: str, start: int, end: int, text: bool, settings: Settings) -> Part:
    """The lines of a file that begin after byte `start` (at it, where that is 0), up to byte `end`.

    text: each is a record of plain text, else JSON.
    """
    part = _new_part(settings)
    file = os.open(path, os.O_RDONLY)
    try:
        place, stop = _next_line(file, start), _next_line(file, end)
        block = bytearray(_BLOCK + 2 * MARGIN)
        while place < stop and (settings.skip_bad or not part.bad):
            block, size = _read_lines(file, place, stop, block, path)
            _convert(block, size, place, place == 0, text, settings, part)
            place += size
    finally:
        os.close(file)
    return part


def convert_lines(data: bytes, is_first: bool, text: bool, settings: Settings) -> Part:
    """The lines of a block that was read elsewhere. is_first: of its source."""
    part = _new_part(settings)
    _convert(bytearray(MARGIN) + data + bytearray(MARGIN), len(data), 0, is_first, text, settings, part)
    for lines in part.outputs:
        lines.chunks = [data[slice(*chunk)] if isinstance(chunk, tuple) else chunk for chunk in lines.chunks]
    return part


def convert_records(records: list[Record], settings: Settings) -> Part:
    """Records that were parsed elsewhere."""
    part = _new_part(settings)
    collected = _Collected(settings, part)
    for where, record in records:
        part.read += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            collected.add(record)
        except BadRecord as error:
            content = error.content if isinstance(record, BadRecord) else _shown(record)
            part.bad.append(Bad(where, str(error), content.encode("utf-8", "replace")))
            if not settings.skip_bad:
                break
    collected.finish()
    return part


def _new_part(settings: Settings) -> Part:
    return Part([Lines() for _ in range(2 if settings.split else 1)])


def _next_line(file: int, place: int) -> int:
    """Where the line after that at `place` begins; 0 for 0."""
    if place == 0:
        return 0
    while chunk := os.pread(file, 1 << 16, place):
        found = chunk.find(b"\n")
        if found >= 0:
            return place + found + 1
        place += len(chunk)
    return place


def _read_lines(file: int, start: int, stop: int, block: bytearray, path: str) -> tuple[bytearray, int]:
    """The next whole lines, in the block or, where it is too small, in a larger one; and their size."""
    size = _BLOCK
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


def _convert(
    block: bytearray, size: int, place: int, is_first: bool, text: bool, settings: Settings, part: Part
) -> None:
    """The lines block[MARGIN : MARGIN + size], which are at `place` of their file."""
    by_record = text or settings.split or settings.as_is or settings.columns or settings.language_filter
    if not by_record and (found := plain_pairs(block, size)):
        ends, empty = found
        lines = np.frombuffer(block, np.uint8)[MARGIN : MARGIN + size]
        part.outputs[0].add((place, place + size), lines, ends, empty, settings.language)
        part.shapes["input/output"] += len(ends)
        part.read += len(ends)
        return
    data = bytes(memoryview(block)[MARGIN : MARGIN + size])
    if text:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    collected = _Collected(settings, part)
    for line in (data.removeprefix(_BOM) if is_first else data).removesuffix(b"\n").split(b"\n"):
        part.read += 1
        stripped = line.strip()
        if not stripped:
            part.blank += 1
            continue
        try:
            if text:
                collected.add({"input": "", "output": _text(stripped)})
            else:
                collected.add(parse_record(stripped), stripped)
        except BadRecord as error:
            part.bad.append(Bad(part.read, str(error), line))
            if not settings.skip_bad:
                break
    collected.finish((place, data))


def _text(line: bytes) -> str:
    if b"\0" in line:
        raise BadRecord(NUL)
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8: {error.reason}; convert the file, with iconv for example") from None


def _shown(record: dict[str, Any]) -> str:
    """A bad record as text."""
    try:
        return json.dumps(record, ensure_ascii=False, default=str)
    except (ValueError, RecursionError) as error:
        return f"a record with the keys {', '.join(record)} that cannot be written: {error}"


class _Collected:
    """Records one by one, until they are added to the part as a block."""

    def __init__(self, settings: Settings, part: Part) -> None:
        self._settings, self._part = settings, part
        self._lines: list[list[bytes]] = [[] for _ in part.outputs]
        self._empty = [0 for _ in part.outputs]

    def add(self, record: dict[str, Any], line: bytes | None = None) -> None:
        """line: the record as it was read, kept where it is in canonical form. Raises BadRecord."""
        settings = self._settings
        left_out: list[str] = []
        try:
            shape, kept = ("as it is", record) if settings.as_is else canonical(record, settings.columns, left_out)
        except RecursionError:
            raise BadRecord(TOO_DEEP) from None
        if settings.language_filter and not is_in_language(prompt_of(kept), settings.language_filter):
            self._part.filtered += 1
            return
        # JSON's lines hold no number that is not finite; and pairs are of strings.
        if (line is None and settings.as_is) or ("messages" in kept and (line is None or has_tools(kept))):
            check_storable(kept)
        stored = to_line(kept) if line is None or kept is not record else line + b"\n"
        if len(stored) > sources.MAX_RECORD:
            raise BadRecord(f"longer than {sources.MAX_RECORD >> 20} MB, which no record is; divide it")
        side = int(bool(settings.split) and mix(settings.seed, _SPLIT, zlib.crc32(stored)) < settings.split * 2**64)
        self._lines[side].append(stored)
        self._empty[side] += kept.get("output", True) == ""
        self._part.shapes[shape] += 1
        if not settings.as_is:
            self._part.findings.look_at(kept, left_out)

    def finish(self, source: tuple[int, bytes] = (0, b"")) -> None:
        """source: place and content of the block the records are from; lines that equal it need not be copied."""
        for side, lines in enumerate(self._lines):
            if lines:
                data = b"".join(lines)
                place, unchanged = source[0], data == source[1]
                self._part.outputs[side].add(
                    (place, place + len(data)) if unchanged else data,
                    np.frombuffer(data, np.uint8),
                    np.cumsum([len(line) for line in lines]),
                    self._empty[side],
                    self._settings.language,
                )
