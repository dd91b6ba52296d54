"""One record as a line of JSON, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

import orjson

from fm9g.data.prepare.fast_scan import count_keys
from fm9g.data.prepare.sources import bounded_lines
from fm9g.data.prepare.values import TOO_DEEP, BadRecord
from fm9g.errors import UserError

_CONTAINERS = (dict, list)
MAX_QUOTED_CHARACTERS = 80  # characters of a bad line that a message quotes


def text_records(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Plain text for pretraining: every line that is not blank is a record, all of it output."""
    for line in lines:
        if text := line.strip():
            yield {"input": "", "output": text}


def decode_lines(stream: IO[bytes], where: str) -> Iterator[str]:
    """The lines of a UTF-8 stream, however they end. Raises UserError that names the line that is not UTF-8."""
    for number, line in enumerate(bounded_lines(stream, where), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}, line {number}: not UTF-8: {error.reason}; convert it, with iconv for example"
            ) from None
        yield from text.replace("\r\n", "\n").split("\r")


def to_line(record: dict[str, Any]) -> bytes:
    """A record as one line of a .jsonl file, with its newline. Raises BadRecord for what JSON cannot hold."""
    try:
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError as error:  # a lone surrogate, an integer of more than 64 bits
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
    """As parse_object, and no key may be given twice: readers differ in which one counts. Raises BadRecord."""
    record = parse_object(line)
    try:
        count = count_keys(line)
    except ValueError:  # an integer of more than 64 bits, which orjson takes for a float
        count = -1
    if count == len(record) and not any(type(value) in _CONTAINERS for value in record.values()):
        return record
    del record  # a large one is held once
    try:
        return _STRICT_DECODER.decode(line.decode())
    except RecursionError:  # json goes less deep than orjson
        raise BadRecord(TOO_DEEP) from None


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises BadRecord where a key is given twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRecord(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return content


_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)


def not_an_object(value: Any) -> str:
    """What is wrong with a value of JSON that is no record."""
    return f"found a JSON {type(value).__name__}, expected an object"


def quote(line: bytes) -> str:
    """The beginning of a line, for a message."""
    text = line[: 4 * MAX_QUOTED_CHARACTERS].decode("utf-8", "replace").strip()
    return repr(
        text[:MAX_QUOTED_CHARACTERS]
        + ("..." if len(text) > MAX_QUOTED_CHARACTERS or len(line) > 4 * MAX_QUOTED_CHARACTERS else "")
    )
