"""What the chat shows. A model's text cannot act on the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import TextIO

from fm9g.printable import printable, printable_lines, raw_stream

_MIN_WIDTH_OF_COLUMNS = 100
_GAP = " │ "


class Screen:
    """Writes answers to the standard output, notes and errors to the standard error.

    Args:
        interactive: whether a person reads it; else it has answers, and neither colors nor headings around them.
    """

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self.out, self._err = raw_stream(sys.stdout), raw_stream(sys.stderr)

    @property
    def has_columns(self) -> bool:
        """Whether two answers fit beside each other."""
        return self.interactive and self.out.isatty() and self._width >= _MIN_WIDTH_OF_COLUMNS

    @property
    def _width(self) -> int:
        return shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """Part of an answer."""
        print(printable_lines(text), end="", flush=True, file=self.out)

    def line(self, text: str = "") -> None:
        """Lines of their own."""
        print(printable_lines(text), flush=True, file=self.out)

    def heading(self, text: str) -> None:
        """The name of the model whose answer follows."""
        print(_styled(printable(text), "1", self.out), flush=True, file=self.out)

    def note(self, text: str) -> None:
        """What the reader should know, in one line."""
        print(_styled(printable(text), "2", self._err), flush=True, file=self._err)

    def error(self, text: str) -> None:
        """What went wrong, in one line."""
        print(_styled(printable(" ".join(text.split())), "31", self._err), flush=True, file=self._err)

    def columns(self, titles: Sequence[str], texts: Sequence[str]) -> None:
        """Two texts beside each other."""
        import wcwidth

        width = (self._width - len(_GAP)) // 2
        wrapped = [
            [
                row
                for line in [title, "─" * width, *text.split("\n")]
                for row in wcwidth.wrap(printable(line.expandtabs(4)), width) or [""]
            ]
            for title, text in zip(titles, texts)
        ]
        for left, right in zip_longest(*wrapped, fillvalue=""):
            self.line(f"{wcwidth.ljust(left, width)}{_GAP}{right}".rstrip())


def _styled(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if stream.isatty() else text
