"""Records from a JSON array, or from JSON objects one after the other, however they are laid out."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from fm9g.data.prepare.decompress import CHUNK_BYTES
from fm9g.data.prepare.record_size import check_record_size
from fm9g.data.prepare.records import given_twice, not_an_object
from fm9g.data.prepare.sources import DataSource
from fm9g.data.prepare.values import TOO_DEEP, BadRecord, LocatedRecord, parse_integer
from fm9g.errors import UserError
from fm9g.io.json_file import DuplicateKeyError, reject_duplicate_keys

_NOT_BLANK = re.compile(r"[^ \t\r\n]")
# A JSON string, complete or cut off at the end of the buffer, or a bracket of an object or list.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)
_LONGEST_WORD = 16  # characters; an error so near the end of the buffer may come from a word that is cut off


def read_json(source: DataSource, stream: IO[bytes]) -> Iterator[LocatedRecord]:
    """Yields the records of a .json file, one in memory at a time, each with its number and line."""
    return _JsonReader(source, stream).records()


class _JsonReader:
    """Decodes value after value from a buffer, and fills the buffer when a value is cut off.

    ... {"a": 1}, {"b": 2}, {"c":
                  ^ start         ^ end of the buffer: read more, drop everything before start
    """

    def __init__(self, source: DataSource, stream: IO[bytes]) -> None:
        self._source = source
        self._text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        self._buffer, self._start = "", 0
        self._line = 1  # number of the line at `start`
        self._num_records = 0
        self._problems: list[str] = []  # of the current value: json.loads would accept it, but no record may have them
        self._decoder = _make_decoder(self._problems)

    def records(self) -> Iterator[LocatedRecord]:
        try:
            yield from self._array() if self._peek() == "[" else self._objects()
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"{self._source}: not UTF-8 after record {self._num_records} ({error.reason})") from None
        except json.JSONDecodeError as error:
            raise self._not_json(error.pos, error.msg) from None
        except ValueError as error:
            raise self._not_json(self._start, str(error)) from None

    def _not_json(self, offset: int, reason: str) -> UserError:
        where = f"{self._source}, line {self._line_at(offset)}, record {self._num_records + 1}"
        return UserError(f"{where}: not JSON: {reason}")

    def _objects(self) -> Iterator[LocatedRecord]:
        while self._peek():
            yield self._next_record()

    def _array(self) -> Iterator[LocatedRecord]:
        self._skip_to(self._start + 1)
        while (character := self._peek()) not in ("", "]"):
            if self._num_records:
                if character != ",":
                    raise ValueError(f"found {character!r} between two records, expected a comma")
                self._skip_to(self._start + 1)
                self._peek()
            yield self._next_record()
        if not character:
            raise ValueError("the array is not closed; the file was cut off")
        self._skip_to(self._start + 1)
        if character := self._peek():
            raise ValueError(f"found {character!r} after the end of the array")

    def _next_record(self) -> LocatedRecord:
        value, end = self._decode()
        self._num_records += 1
        where = f"record {self._num_records} (line {self._line})"
        if not isinstance(value, dict):
            self._problems.append(not_an_object(value))
        record = BadRecord(self._problems[0], self._buffer[self._start : end]) if self._problems else value
        self._skip_to(end)
        return where, record

    def _decode(self) -> tuple[Any, int]:
        """The value at `start`, and where it ends in the buffer."""
        while True:
            self._problems.clear()
            try:
                return self._decoder.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._buffer) - _LONGEST_WORD
                if not ((near_end or error.msg.startswith("Unterminated string")) and self._fill()):
                    raise
            except RecursionError:
                self._problems[:] = [TOO_DEEP]
                if (end := _find_value_end(self._buffer, self._start)) is not None:
                    return {}, end
                if not self._fill():
                    raise ValueError("it breaks off") from None

    def _peek(self) -> str:
        """Skips blanks; returns the next character, empty at the end of the file."""
        while True:
            match = _NOT_BLANK.search(self._buffer, self._start)
            self._skip_to(match.start() if match else len(self._buffer))
            if match or not self._fill():
                return self._buffer[self._start : self._start + 1]

    def _fill(self) -> bool:
        """Reads more of the file; returns False at its end."""
        self._buffer, self._start = self._buffer[self._start :], 0
        check_record_size(len(self._buffer), self._source)
        chunk = self._text.read(max(CHUNK_BYTES, len(self._buffer)))
        self._buffer += chunk
        return bool(chunk)

    def _skip_to(self, offset: int) -> None:
        self._line = self._line_at(offset)
        self._start = offset

    def _line_at(self, offset: int) -> int:
        """Number of the line at an offset behind `start`."""
        return self._line + self._buffer.count("\n", self._start, offset)


def _make_decoder(problems: list[str]) -> json.JSONDecoder:
    """A decoder that appends to `problems` what is wrong with a value, and decodes it to its end."""

    def collect_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return reject_duplicate_keys(pairs)
        except DuplicateKeyError as error:
            problems.append(given_twice(error))
            return dict(pairs)

    def integer(text: str) -> int:
        try:
            return parse_integer(text)
        except ValueError as error:
            problems.append(str(error))
            return 0

    return json.JSONDecoder(
        object_pairs_hook=collect_pairs,
        parse_int=integer,
        parse_constant=lambda name: problems.append(f"not JSON: {name} is not a number"),
    )


def _find_value_end(buffer: str, start: int) -> int | None:
    """The end of the object or list that starts at `start`; None if the buffer does not hold it."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(buffer, start):
        character = buffer[match.start()]
        depth += (character in "[{") - (character in "]}")
        if depth == 0:
            return match.end()
    return None
