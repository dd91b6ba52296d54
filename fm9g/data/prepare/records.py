"""A record as a line of JSON, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

import orjson

from fm9g.data.prepare.fast_scan import count_keys
from fm9g.data.prepare.record_size import bounded_lines
from fm9g.data.prepare.values import TOO_DEEP, BadRecord
from fm9g.errors import UserError
from fm9g.io.json_file import DuplicateKeyError, reject_duplicate_keys

_MAX_QUOTED_CHARACTERS = 80  # of a bad line, in a message
_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)


def text_records(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yields plain text for pretraining: a record per line that is not blank, without an input."""
    for line in lines:
        if text := line.strip():
            yield {"input": "", "output": text}


def decode_lines(stream: IO[bytes], where: str) -> Iterator[str]:
    """Yields the lines of a UTF-8 stream, with any line ends. Raises UserError with the number of a bad line."""
    for number, line in enumerate(bounded_lines(stream, where), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}, line {number}: not UTF-8: {error.reason}; convert it, with iconv for example"
            ) from None
        yield from text.replace("\r\n", "\n").split("\r")


def to_line(record: dict[str, Any]) -> bytes:
    """A record as one line of a .jsonl file, with its newline. Raises BadRecord for values that JSON cannot hold."""
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:  # a lone surrogate, or an integer of more than 64 bits
        raise BadRecord(f"cannot be written as JSON: {error}") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """The object on a line of JSON. Raises BadRecord."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("depth limit"):
            raise BadRecord(TOO_DEEP) from None
        raise BadRecord(f"not JSON: {error.msg}, character {error.pos + 1}") from None
    if not isinstance(record, dict):
        raise BadRecord(not_an_object(record))
    return record


def parse_record(line: bytes) -> dict[str, Any]:
    """As `parse_object`, but refuses an object with a repeated key: readers differ in which value counts."""
    record = parse_object(line)
    try:
        num_keys = count_keys(line)
    except ValueError:  # an integer of more than 64 bits, which orjson parses as a float
        num_keys = -1
    if num_keys == len(record) and not any(isinstance(value, (dict, list)) for value in record.values()):
        return record
    del record  # only one copy of a large record in memory
    try:
        content: dict[str, Any] = _STRICT_DECODER.decode(line.decode())
        return content
    except DuplicateKeyError as error:
        raise BadRecord(given_twice(error)) from None
    except RecursionError:  # json allows fewer levels than orjson
        raise BadRecord(TOO_DEEP) from None


def given_twice(error: DuplicateKeyError) -> str:
    """What is wrong with a record that has a key twice."""
    return f"the key {error.key!r} is given twice"


def not_an_object(value: Any) -> str:
    """What is wrong with a JSON value that is not a record."""
    return f"found a JSON {type(value).__name__}, expected an object"


def quote(line: bytes) -> str:
    """The beginning of a line, for a message."""
    text = line[: 4 * _MAX_QUOTED_CHARACTERS].decode("utf-8", "replace").strip()
    is_cut = len(text) > _MAX_QUOTED_CHARACTERS or len(line) > 4 * _MAX_QUOTED_CHARACTERS
    return repr(text[:_MAX_QUOTED_CHARACTERS] + ("..." if is_cut else ""))
