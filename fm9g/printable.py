"""Text from files and names, made fit for a terminal: what would act on it is shown instead.

Colours, cursor movements and other escape sequences begin with control characters, and marks of direction let a text
read as another one. All else stays as it is: Chinese, accents, emoji with their joiners.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_ESCAPES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32)}  # ESC becomes the sign ␛, of one column
_ESCAPES |= {0x7F: "\u2421"}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F))}
_ESCAPES |= {code: f"\\u{code:04x}" for code in range(0x2066, 0x206A)}
del _ESCAPES[ord("\t")]
_ESCAPES_BUT_NEWLINE = {code: shown for code, shown in _ESCAPES.items() if code != ord("\n")}


def printable(text: str) -> str:
    """A text of one line, such as a name, that moves no cursor, sets no colour, and ends no line."""
    return text if text.isprintable() else text.translate(_ESCAPES)


def printable_lines(text: str) -> str:
    """The same for a text that may have several lines."""
    return text if text.isprintable() else text.translate(_ESCAPES_BUT_NEWLINE)


class PrintableStream:
    """A stream that makes what is written to it printable; for all else it is the stream that it is given."""

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        self.raw.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """No, so that libraries that look leave out colours and bars, which would be shown as signs."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw_stream(stream: Any) -> TextIO:
    """The stream below a PrintableStream, for text that is printable already, and has colours of our own."""
    return stream.raw if isinstance(stream, PrintableStream) else stream


@contextmanager
def printable_output() -> Iterator[None]:
    """Inside, nothing that is printed acts on the terminal, but what is written to raw_stream(stream)."""
    saved = sys.stdout, sys.stderr
    wrapped = [stream if isinstance(stream, PrintableStream) else PrintableStream(stream) for stream in saved]
    sys.stdout, sys.stderr = cast("list[TextIO]", wrapped)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = saved
