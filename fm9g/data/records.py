"""From raw text to records: JSON objects, one a line, with "input" (read) and "output" (learnt)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from fm9g.errors import UserError

SHOWN = 80  # characters of a bad line that a message quotes


def text_records(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Plain text for pretraining: every line that is not blank is a record, all of it output."""
    for line in lines:
        if text := line.strip():
            yield {"input": "", "output": text}


def decoded_lines(stream: Iterable[bytes], where: str) -> Iterator[str]:
    """The lines of a UTF-8 stream, however they end. Raises UserError that names the line that is not UTF-8."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}, line {number}: not UTF-8: {error.reason}; convert it, with iconv for example"
            ) from None
        yield from text.replace("\r\n", "\n").split("\r")


def to_line(record: dict[str, Any]) -> bytes:
    """A record as one line of a .jsonl file, with its newline."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    """The record that a line of a .jsonl file holds.

    where: names the line in a message ("train.jsonl, line 7").
    Raises UserError for a line that is not a JSON object, or whose input or output is not a string.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}: {quote(line)}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: found a JSON {type(record).__name__}, expected an object: {quote(line)}")
    for key in ("input", "output"):
        if not isinstance(record.get(key, ""), str):
            raise UserError(f"{where}: {key}: found {type(record[key]).__name__}, expected a string: {quote(line)}")
    return record


def quote(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text[:SHOWN] + ("..." if len(text) > SHOWN else ""))
