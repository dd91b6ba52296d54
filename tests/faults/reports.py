"""What the reports of all campaigns share."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "robustness"


def machine() -> str:
    """A sentence on the machine and its software."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{os.cpu_count()} cores, which others used too, {memory:.0f} GB of memory, Linux; "
        f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}."
    )


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
