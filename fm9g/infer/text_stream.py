"""The text of tokens as they come: no half characters, nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Passes on the text of tokens as soon as later tokens cannot change it.

    ids:   [ forgotten | start .. emitted | emitted .. ]
                         context            not passed on yet

    Args:
        tokenizer: of transformers.
        stop: texts that end the continuation.

    Attributes:
        stopped: whether a stop text has come; there is no text after it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = self._emitted = 0
        self._held = ""  # text that may be the beginning of a stop text
        self.stopped = False

    def add(self, token_ids: Sequence[int], last: bool = False) -> str:
        """The new text. last: nothing comes after these tokens."""
        self._ids += token_ids
        # The text of a token depends on the one before it (spaces), and a character may take several tokens.
        before = self._decode(self._ids[self._start : self._emitted])
        text = self._decode(self._ids[self._start :])
        new = ""
        if len(text) > len(before) and (last or not text.endswith("\ufffd")):
            new = text[len(before) :]
            self._start, self._emitted = self._emitted, len(self._ids)
        return self._up_to_stop(new, last) if self._stop else new

    def _up_to_stop(self, new: str, last: bool) -> str:
        text = "" if self.stopped else self._held + new
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, text, last = True, text[: min(found)], True
        held = 0 if last else max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text with which stop begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
