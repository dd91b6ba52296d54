"""A finding, and how findings are shown."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One finding. advice: what to do where the status is not ok, of several ways a line each."""

    status: str
    name: str
    found: str
    advice: str = ""


def show(lines: list[Line]) -> str:
    """The findings as text, what to do below what is not ok."""
    width = max(len(line.name) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{line.status:<8} {line.name:<{width}}  {line.found}")
        rows += [f"{'':<8} {'':<{width}}  -> {text}" for text in line.advice.splitlines()]
    counts = {status: sum(line.status == status for line in lines) for status in (ERROR, WARNING)}
    return "\n".join([*rows, ", ".join(f"{n} {status}{'s' * (n != 1)}" for status, n in counts.items())])
