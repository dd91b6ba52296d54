"""A finding, and findings as text."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """The result of a check. advice: what to do if the status is not ok, one alternative per line."""

    status: str
    name: str
    detail: str
    advice: str = ""


def format_findings(findings: list[Finding]) -> str:
    """The findings as text, with advice below those that are not ok."""
    width = max(len(finding.name) for finding in findings)
    rows = []
    for finding in findings:
        rows.append(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}")
        rows += [f"{'':<8} {'':<{width}}  -> {text}" for text in finding.advice.splitlines()]
    counts = {status: sum(finding.status == status for finding in findings) for status in (ERROR, WARNING)}
    return "\n".join([*rows, ", ".join(f"{n} {status}{'s' * (n != 1)}" for status, n in counts.items())])
