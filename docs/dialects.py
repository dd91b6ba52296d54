"""Writes dialects.md: every argument of other tools, from the tables. `python docs/dialects.py`, or `make docs`."""

from __future__ import annotations

from pathlib import Path

from fm9g.config.dialects.table import UNSET, Row
from fm9g.config.dialects.translate import dialects

TARGET = Path(__file__).with_name("dialects.md")
_HEAD = """# Arguments of other tools

What `fm9g train` does with the arguments of other tools. `--from NAME` says which tool is meant; without it, the tool
is recognized by the names. This page is made by `make docs`.
"""


def table() -> str:
    """The page."""
    parts = [_HEAD]
    for dialect in dialects().values():
        parts.append(
            f"\n## {dialect.title} {dialect.version}".rstrip()
            + f"\n\n`--from {dialect.name}`\n\n| argument | here | their default | note |\n|---|---|---|---|\n"
        )
        for row in dialect.rows:
            name = ", ".join(f"`{name}`" for name in (row.name, *row.aliases)) + f" ({row.label})" * bool(row.label)
            default = "" if row.default in (UNSET, None, "") else f"`{row.default}`"
            cells = (name, _effect(row), default, row.note)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


def _effect(row: Row) -> str:
    if row.ignored:
        return f"no effect: {row.ignored}"
    if row.refused:
        accepted = f"; accepted: {', '.join(f'`{value}`' for value in row.harmless)}" if row.harmless else ""
        return f"refused: {row.refused}{accepted}"
    return f"`{row.ours}`" if row.ours else "computed together with other arguments"


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
    print(TARGET)
