"""Spellings of special tokens that are text: marked before a template or script runs, found again after it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from fm9g.data.values import BadRecord

_MARK = "\ufdd4"  # a Unicode noncharacter; it stands after the first character of a spelling

Span = tuple[int, int]  # start and end in a text, in characters


def protect(value: Any, pattern: re.Pattern[str], is_new: bool = True) -> Any:
    """The value with a mark in each spelling that the pattern matches, in all strings inside.

    is_new: it has no marks yet. Raises BadRecord where it holds one all the same.
    """
    if isinstance(value, str):
        if is_new and _MARK in value:
            raise BadRecord("holds the noncharacter U+FDD4, which stands for something else here; remove it")
        if not pattern.search(value):
            return value
        return pattern.sub(_marked, value)
    if isinstance(value, dict):
        return {protect(key, pattern, is_new): protect(item, pattern, is_new) for key, item in value.items()}
    if isinstance(value, list):
        return [protect(item, pattern, is_new) for item in value]
    return value


def without_marks(value: Any) -> Any:
    """The value as it was before it was protected."""
    if isinstance(value, str):
        return value.replace(_MARK, "")
    if isinstance(value, dict):
        return {without_marks(key): without_marks(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_marks(item) for item in value]
    return value


def _marked(match: re.Match[str]) -> str:
    text = match[0]
    is_marked = match.string.startswith(_MARK, match.end())  # one of a single character
    return text if is_marked else text[0] + _MARK + text[1:]


class Unprotected:
    """A text without its marks. literal: the spans of the spellings that were marked."""

    def __init__(self, text: str, pattern: re.Pattern[str]) -> None:
        self.text = text
        self.literal: list[Span] = []
        self._marks: list[int] = []
        if _MARK not in text:
            return
        self._marks = [place for place, character in enumerate(text) if character == _MARK]
        self.text = text.replace(_MARK, "")
        for number, place in enumerate(self._marks):
            if found := pattern.match(self.text, place - number - 1):
                self.literal.append(found.span())

    def moved(self, spans: Iterable[Span]) -> list[Span]:
        """Spans of the marked text, in this one."""
        return [(self.place(start), self.place(end)) for start, end in spans]

    def place(self, place: int) -> int:
        """A place of the marked text, in this one."""
        return place - bisect_left(self._marks, place)
