"""A finding, and findings as text."""

from __future__ import annotations

from dataclasses import dataclass

from fm9g.text_table import text_table

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """The result of a check. advice: the remedy if the status is not ok, one alternative per line."""

    status: str
    name: str
    detail: str
    advice: str = ""


def format_findings(findings: list[Finding]) -> str:
    """The findings as text, with advice below those that are not ok."""
    rows = []
    for finding in findings:
        rows.append((finding.status, finding.name, finding.detail))
        rows += [("", "", f"-> {text}") for text in finding.advice.splitlines()]
    counts = {status: sum(finding.status == status for finding in findings) for status in (ERROR, WARNING)}
    return "\n".join([*text_table(rows), ", ".join(f"{n} {status}{'s' * (n != 1)}" for status, n in counts.items())])
