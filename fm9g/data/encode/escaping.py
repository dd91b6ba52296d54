"""Spellings of special tokens that are plain text: escaped before a template or transform runs, found again after it.

data           "what is </s>?"
escaped        "what is <E/s>?"            E: a noncharacter after the first character of the spelling
template       "<s>what is <E/s>?</s>"     what the template itself writes has no E
unescaped      "<s>what is </s>?</s>"      with the span of the first </s>, which is encoded as letters
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from fm9g.data.prepare.values import BadRecord

_ESCAPE = "\ufdd4"  # a Unicode noncharacter; it stands after the first character of a spelling

Span = tuple[int, int]  # start and end in a text, in characters


def escape_special_tokens(value: Any, pattern: re.Pattern[str], is_raw: bool = True) -> Any:
    """Escapes each match of the pattern in all strings inside a value.

    is_raw: no string is escaped yet. Raises BadRecord if one holds the escape character nevertheless.
    """
    if isinstance(value, str):
        if is_raw and _ESCAPE in value:
            raise BadRecord("holds the noncharacter U+FDD4, which fm9g uses internally as an escape; remove it")
        if not pattern.search(value):
            return value
        return pattern.sub(_escape_match, value)
    if isinstance(value, dict):
        return {
            escape_special_tokens(key, pattern, is_raw): escape_special_tokens(item, pattern, is_raw)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [escape_special_tokens(item, pattern, is_raw) for item in value]
    return value


def unescape(value: Any) -> Any:
    """The value without escapes in all strings inside."""
    if isinstance(value, str):
        return value.replace(_ESCAPE, "")
    if isinstance(value, dict):
        return {unescape(key): unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unescape(item) for item in value]
    return value


def _escape_match(match: re.Match[str]) -> str:
    text = match[0]
    is_escaped = match.string.startswith(_ESCAPE, match.end())  # a spelling of one character
    return text if is_escaped else text[0] + _ESCAPE + text[1:]


class Unescaped:
    """A text without its escapes. escaped: the spans of the spellings that were escaped."""

    def __init__(self, text: str, pattern: re.Pattern[str]) -> None:
        self.text = text
        self.escaped: list[Span] = []
        self._escapes: list[int] = []
        if _ESCAPE not in text:
            return
        self._escapes = [offset for offset, character in enumerate(text) if character == _ESCAPE]
        self.text = text.replace(_ESCAPE, "")
        for number, offset in enumerate(self._escapes):
            if found := pattern.match(self.text, offset - number - 1):
                self.escaped.append(found.span())

    def map_spans(self, spans: Iterable[Span]) -> list[Span]:
        """Converts spans of the escaped text to this one."""
        return [(self.map_offset(start), self.map_offset(end)) for start, end in spans]

    def map_offset(self, offset: int) -> int:
        """Converts an offset in the escaped text to this one."""
        return offset - bisect_left(self._escapes, offset)
