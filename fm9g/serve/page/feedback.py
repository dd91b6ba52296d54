"""What people think of answers, as records for preference training.

FOLDER/preferences.jsonl   {"messages": [...], "chosen": turn, "rejected": turn}   of a comparison
FOLDER/thumbs.jsonl        {"messages": [...], "label": true or false}             of a thumb, as for KTO
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fm9g.io.lock import wait_lock

PREFERENCES, THUMBS = "preferences.jsonl", "thumbs.jsonl"
Messages = Sequence[Mapping[str, Any]]


def add_preference(folder: Path, prompt: Messages, chosen: str, rejected: str) -> None:
    """Records that of two answers to a conversation one is better."""
    answers = {
        key: {"role": "assistant", "content": content} for key, content in (("chosen", chosen), ("rejected", rejected))
    }
    _append(folder / PREFERENCES, {"messages": list(prompt), **answers})


def add_thumb(folder: Path, conversation: Messages, is_good: bool) -> None:
    """Records that the last answer of a conversation is good, or not."""
    _append(folder / THUMBS, {"messages": list(conversation), "label": is_good})


def _append(file: Path, record: Mapping[str, Any]) -> None:
    """Appends a line, whole or not at all, also beside other processes."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    with wait_lock(file.with_name(f"{file.name}.lock"), f"{file}: waiting for another process"):
        size = file.stat().st_size if file.exists() else 0
        with file.open("ab", buffering=0) as output:
            try:
                if output.write(line) != len(line):
                    raise OSError(28, "No space left on device", str(file))
            except OSError:
                os.truncate(file, size)
                raise
