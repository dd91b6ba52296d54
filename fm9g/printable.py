"""Makes text from files and names safe to print: characters that would act on the terminal are shown instead.

Colors, cursor movements and other escape sequences start with control characters, and direction marks can make a text
read as another one. Everything else stays: Chinese, accents, emoji with their joiners.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_ESCAPES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32)}  # ESC becomes ␛, one column wide
_ESCAPES |= {0x7F: "\u2421"}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F))}
_ESCAPES |= {code: f"\\u{code:04x}" for code in range(0x2066, 0x206A)}
del _ESCAPES[ord("\t")]
_ESCAPES_BUT_NEWLINE = {code: shown for code, shown in _ESCAPES.items() if code != ord("\n")}


def printable(text: str) -> str:
    """Makes a text of one line safe, such as a name: no cursor movement, no color, no line break."""
    return text if text.isprintable() else text.translate(_ESCAPES)


def printable_lines(text: str) -> str:
    """The same for a text that may have several lines."""
    return text if text.isprintable() else text.translate(_ESCAPES_BUT_NEWLINE)


class PrintableStream:
    """Wraps a stream and makes everything written to it printable."""

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        self.raw.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """False, so that libraries omit colors and progress bars, which would be shown as characters."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: Any) -> TextIO:
    """The stream inside a PrintableStream, for text that is safe already and contains our own colors."""
    return stream.raw if isinstance(stream, PrintableStream) else stream


@contextmanager
def printable_output() -> Iterator[None]:
    """In the block, printed text cannot act on the terminal, except text written to raw_stream(stream)."""
    saved = sys.stdout, sys.stderr
    wrapped = [stream if isinstance(stream, PrintableStream) else PrintableStream(stream) for stream in saved]
    sys.stdout, sys.stderr = cast("list[TextIO]", wrapped)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = saved
