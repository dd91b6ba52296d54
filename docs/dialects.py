"""Writes dialects.md: every argument of other tools, from the tables. `python docs/dialects.py`, or `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from fm9g.config.dialects.table import UNSET, Dialect, Row
from fm9g.config.dialects.translate import dialects

TARGET = Path(__file__).with_name("dialects.md")
TESTS = Path(__file__).resolve().parents[1] / "tests"
EVERY_ROW = TESTS / "test_dialects_table.py"  # gives each argument to the translation and looks what changes
_HEAD = """# Arguments of other tools

What `fm9g train` does with the arguments of other tools. `--from NAME` says which tool is meant; without it, the tool
is recognized by the names. `fm9g config translate` prints a file or a command in our keys. This page is made by
`make docs`.

"Tested by" names files of `tests/`. `test_dialects_table.py` gives every argument to the translation and checks that it
sets a key, says why it has no effect, or is refused; the other files check values.
"""


def table() -> str:
    """The page."""
    parts = [_HEAD]
    words = _words_of_tests()
    for dialect in dialects().values():
        parts.append(
            f"\n## {dialect.title} {dialect.version}".rstrip()
            + f"\n\n`--from {dialect.name}`\n\n| argument | here | their default | note | tested by |\n"
            + "|---|---|---|---|---|\n"
        )
        for row in dialect.rows:
            name = ", ".join(f"`{name}`" for name in (row.name, *row.aliases)) + f" ({row.label})" * bool(row.label)
            default = "" if row.default in (UNSET, None, "") else f"`{row.default}`"
            tests = ", ".join(f"`{file.relative_to(TESTS)}`" for file in _tests_of(dialect, row, words))
            cells = (name, _effect(row), default, row.note, tests)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


def _effect(row: Row) -> str:
    if row.ignored:
        return f"no effect: {row.ignored}"
    if row.refused:
        accepted = f"; accepted: {', '.join(f'`{value}`' for value in row.harmless)}" if row.harmless else ""
        return f"refused: {row.refused}{accepted}"
    if row.rule:
        return f"computed: {' '.join((row.rule.__doc__ or '').split(chr(10) * 2)[0].split())}"
    return f"`{row.ours}`"


def _words_of_tests() -> dict[Path, set[str]]:
    """The names that each test of dialects contains, by file."""
    files = [*(TESTS / "config" / "dialects").glob("test_*.py"), TESTS / "shorthand" / "test_dialect_runs.py"]
    return {file: set(re.findall(r"[\w.]+", file.read_text(encoding="utf-8"))) for file in sorted(files)}


def _tests_of(dialect: Dialect, row: Row, words: dict[Path, set[str]]) -> list[Path]:
    """The files that test an argument: those that name it and the dialect, else the one for every row."""
    constant = dialect.name.upper().replace("-", "_").replace("9G", "NINE_G")
    named = [file for file, found in words.items() if constant in found and found & {row.name, *row.aliases}]
    return named or [EVERY_ROW]


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
    print(TARGET)
