"""Checks a block of JSON lines at once, without creating a Python object per line.

numpy compares bytes and simdjson validates the JSON, so that checking costs less than copying.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

_NEWLINE, _QUOTE, _BACKSLASH, _SPACE = b'\n"\\ '
MARGIN = 64  # bytes before and after the lines of a block
_CONTINUATION = -64  # as int8, continuation bytes of UTF-8 (0x80 to 0xBF) are below it


class BitRank:
    """A bit per byte of a block, packed so that counting bits is cheap."""

    def __init__(self, mask: np.ndarray) -> None:
        """mask: (n,) bool."""
        packed = np.packbits(mask, bitorder="little")
        self._words = np.zeros(len(mask) // 64 + 1, np.uint64)
        self._words.view(np.uint8)[: len(packed)] = packed
        self._ranks = np.concatenate(([0], np.cumsum(np.bitwise_count(self._words), dtype=np.int64)))

    def count_before(self, offsets: np.ndarray) -> np.ndarray:
        """(n,) number of true bits before each of these (n,) offsets."""
        word, bit = offsets >> 6, (offsets & 63).astype(np.uint64)
        below = self._words[word] & ((np.uint64(1) << bit) - np.uint64(1))
        counts: np.ndarray = self._ranks[word] + np.bitwise_count(below)
        return counts


def bit_positions(mask: np.ndarray) -> np.ndarray:
    """(count,) positions of a sparse mask's true bits, as numpy.flatnonzero, but eight bits are tested at once."""
    tail = len(mask) & ~7
    words = mask[:tail].view(np.uint64)
    nonzero = np.flatnonzero(words != 0)
    bits = np.flatnonzero(words[nonzero].view(np.bool_))
    return np.concatenate((nonzero[bits >> 3] * 8 + (bits & 7), tail + np.flatnonzero(mask[tail:])))


# The published estimate: 0.7 tokens per character of Chinese, otherwise 1.5 per whitespace-separated word.
TOKENS_PER_UNIT = {"zh": 0.7, "en": 1.5, "code": 1.5}


def count_units(block: np.ndarray, ends: np.ndarray, language: str) -> np.ndarray:
    """(lines,) number of characters (zh) or words of each line.

    block: (bytes,) uint8, lines of JSON. ends: (lines,) where each ends, behind its newline.
    """
    if language == "zh":
        characters = ends - BitRank(block.view(np.int8) < _CONTINUATION).count_before(ends)
        units: np.ndarray = np.diff(characters, prepend=0) - 1  # without the newline
        return units
    blank = block <= _SPACE
    starts = ~blank
    starts[1:] &= blank[:-1]
    return np.diff(BitRank(starts).count_before(ends), prepend=0)


def scan_pairs(block: bytearray, size: int) -> tuple[np.ndarray, int] | None:
    """The line ends of block[MARGIN : MARGIN + size] and the number of empty outputs, if every line is a plain pair.

    A plain pair is `{"input": "...", "output": "..."}`, with or without the spaces, in valid JSON and UTF-8. It has
    exactly eight quotes that no backslash escapes, so with its newline nine hits per line are compared by columns:

        {"input": "...", "output": "..."}⏎
         0     1  2   3  4      5  6   7 newline

    Returns None if any line is something else. The block is changed meanwhile, and restored.
    """
    lines = np.frombuffer(block, np.uint8)[MARGIN : MARGIN + size]
    if not size or lines[-1] != _NEWLINE:
        return None
    hits = lines == _QUOTE
    hits[1:] &= lines[:-1] != _BACKSLASH  # a quote behind an escaped backslash is missed, and the count is not eight
    hits |= lines == _NEWLINE
    positions = bit_positions(hits)
    if len(positions) % 9:
        return None
    *q, newlines = np.ascontiguousarray(positions.reshape(-1, 9).T)  # nine of each line, if all lines are pairs
    ends = newlines + 1
    starts = np.concatenate(([0], ends[:-1]))

    words = np.ndarray(size, "<u8", block, MARGIN, strides=(1,))  # the eight bytes from each offset on, as an integer

    def holds(where: np.ndarray, word: bytes) -> bool:
        mask = (1 << 8 * len(word)) - 1
        return bool(np.all(words[where] & np.uint64(mask) == int.from_bytes(word, "little")))

    if not (
        np.all(q[0] == starts + 1)
        and np.all(q[1] == q[0] + 6)
        and np.all(q[5] == q[4] + 7)
        and holds(starts, b'{"input"')
        and np.all((q[4] - q[3] == 2) | ((q[4] - q[3] == 3) & (lines[q[3] + 2] == _SPACE)))
        and holds(q[3], b'",')
        and holds(q[4], b'"output"')
        and holds(q[7], b'"}\n')
    ):
        return None
    # The rest is right if the block is valid JSON, as an array: then each line is an object of two strings.
    lines[newlines] = ord(",")
    block[MARGIN - 1], block[MARGIN + size - 1] = ord("["), ord("]")
    try:
        _parser().parse(memoryview(block)[MARGIN - 1 : MARGIN + size])
    except (ValueError, RuntimeError):  # simdjson raises RuntimeError for some numbers
        return None
    finally:
        lines[newlines] = _NEWLINE
    return ends, int(np.count_nonzero(q[7] == q[6] + 1))


def count_keys(line: bytes) -> int:
    """Number of keys of the object on a line of JSON, each repetition counted. Raises ValueError."""
    try:
        return len(_parser().parse(line))
    except RuntimeError as error:  # an integer of more than 64 bits
        raise ValueError(error) from None


@cache
def _parser() -> Any:
    import simdjson

    return simdjson.Parser()
