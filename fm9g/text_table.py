"""Aligned columns of text for a terminal, where East Asian characters are two columns wide."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

from fm9g.printable import printable


def display_width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def pad(text: str, width: int, right: bool = False) -> str:
    """The text with spaces up to `width` columns. right: align it to the right."""
    space = " " * (width - display_width(text))
    return space + text if right else text + space


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table, two spaces between columns, without spaces at the ends of lines.

    Args:
        rows: cells of each row. Characters that would act on the terminal are shown instead.
        right: numbers of the columns that are aligned to the right.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(display_width, column)) for column in zip(*cells)]
    return [
        "  ".join(pad(cell, widths[number], number in right) for number, cell in enumerate(row)).rstrip()
        for row in cells
    ]
