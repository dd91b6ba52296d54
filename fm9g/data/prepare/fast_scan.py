"""Looking at many lines at once: what a block of JSON lines holds, without making a Python object of any of them.

Bytes are compared by numpy and the JSON inside by simdjson, so that checking costs less than copying.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

_NEWLINE, _QUOTE, _BACKSLASH, _SPACE = b'\n"\\ '
MARGIN = 64
_CONTINUATION = -64  # int8: bytes 0x80 to 0xBF, all but the first of a UTF-8 character, are below it


class BitRank:
    """A truth value for each byte of a block, packed so that counting costs little."""

    def __init__(self, mask: np.ndarray) -> None:
        """mask: (n,) bool."""
        packed = np.packbits(mask, bitorder="little")
        self._words = np.zeros(len(mask) // 64 + 1, np.uint64)
        self._words.view(np.uint8)[: len(packed)] = packed
        self._ranks = np.concatenate(([0], np.cumsum(np.bitwise_count(self._words), dtype=np.int64)))

    def count_before(self, offsets: np.ndarray) -> np.ndarray:
        """How many of the bytes before each place are true."""
        word, bit = offsets >> 6, (offsets & 63).astype(np.uint64)
        below = self._words[word] & ((np.uint64(1) << bit) - np.uint64(1))
        return self._ranks[word] + np.bitwise_count(below)


def bit_positions(mask: np.ndarray) -> np.ndarray:
    """(count,) where a sparse mask is true, in order: as numpy's flatnonzero, but it looks at eight at once."""
    whole = len(mask) & ~7
    words_of_mask = mask[:whole].view(np.uint64)
    words = np.flatnonzero(words_of_mask != 0)
    found = np.flatnonzero(words_of_mask[words].view(np.bool_))
    return np.concatenate((words[found >> 3] * 8 + (found & 7), whole + np.flatnonzero(mask[whole:])))


# The toolkit's estimate of tokens: 0.7 a character in Chinese, 1.5 a whitespace-separated word otherwise.
TOKENS_PER_UNIT = {"zh": 0.7, "en": 1.5, "code": 1.5}


def count_units(block: np.ndarray, ends: np.ndarray, language: str) -> np.ndarray:
    """(lines,) characters (zh) or words of the lines of JSON that end at `ends`, each with its newline."""
    if language == "zh":
        characters = ends - BitRank(block.view(np.int8) < _CONTINUATION).count_before(ends)
        return np.diff(characters, prepend=0) - 1
    blank = block <= _SPACE
    starts = ~blank
    starts[1:] &= blank[:-1]
    return np.diff(BitRank(starts).count_before(ends), prepend=0)


def scan_pairs(block: bytearray, size: int) -> tuple[np.ndarray, int] | None:
    """The line ends of block[MARGIN : MARGIN + size], and how many outputs are empty, where each line is a plain pair.

    That is `{"input": "...", "output": "..."}`, with or without the spaces, in valid JSON and UTF-8, and nothing else.
    None where any line is something else. block: has a margin on either side; it is as before when this returns.
    """
    lines = np.frombuffer(block, np.uint8)[MARGIN : MARGIN + size]
    if not size or lines[-1] != _NEWLINE:
        return None
    hits = lines == _QUOTE
    hits[1:] &= lines[:-1] != _BACKSLASH  # what else a backslash may do ends in a number of quotes other than eight
    hits |= lines == _NEWLINE
    positions = bit_positions(hits)
    if len(positions) % 9:
        return None
    *q, newlines = np.ascontiguousarray(positions.reshape(-1, 9).T)  # of each line, if all is well
    ends = newlines + 1
    starts = np.concatenate(([0], ends[:-1]))

    words = np.ndarray(size, "<u8", block, MARGIN, strides=(1,))  # the eight bytes from each place on, as a number

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
    # What is not looked at above can only be right if all is valid JSON: each line then is an object of two strings.
    lines[newlines] = ord(",")
    block[MARGIN - 1], block[MARGIN + size - 1] = ord("["), ord("]")
    try:
        _parser().parse(memoryview(block)[MARGIN - 1 : MARGIN + size])
    except (ValueError, RuntimeError):  # RuntimeError: what simdjson says of some numbers
        return None
    finally:
        lines[newlines] = _NEWLINE
    return ends, int(np.count_nonzero(q[7] == q[6] + 1))


def count_keys(line: bytes) -> int:
    """How many keys the object on a line of JSON has, repeated ones counted each time. Raises ValueError."""
    try:
        return len(_parser().parse(line))
    except RuntimeError as error:  # an integer of more than 64 bits
        raise ValueError(error) from None


@cache
def _parser() -> Any:
    import simdjson

    return simdjson.Parser()
