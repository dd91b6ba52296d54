"""Checks that all processes of a run would do the same work: same code, configuration and data."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fm9g import __version__
from fm9g.errors import UserError

_MAX_VALUE_LENGTH = 60  # characters of a value in a message
_MAX_DIFFERENCES = 4  # in a message


class RankMismatchError(UserError):
    """A process differs from process 0. rank: its number. host: its machine."""

    def __init__(self, text: str, rank: int, host: str) -> None:
        super().__init__(text)
        self.rank, self.host = rank, host


@functools.cache
def code_fingerprint() -> str:
    """Returns the version and 12 digits of a SHA-256 over the names and contents of fm9g's source files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return f"{__version__} {digest.hexdigest()[:12]}"


def check_same(fingerprints: Sequence[Mapping[str, Any]], hosts: Sequence[str], kind: str = "rank") -> None:
    """Raises RankMismatchError if a process differs from process 0; names the first such process and the differences.

    Args:
        fingerprints: per process, nested dictionaries that must be equal, such as
            {"code": code_fingerprint(), "config": {...}}.
        hosts: per process, the name of its machine.
        kind: what the message calls a process: "rank" or "node".
    """
    for rank in range(1, len(fingerprints)):
        if differing := differences(fingerprints[rank], fingerprints[0]):
            more = f" and {len(differing) - _MAX_DIFFERENCES} more" if len(differing) > _MAX_DIFFERENCES else ""
            pairs = "; ".join(
                f"{key}: {_truncate(mine)} there, {_truncate(first)}"
                for key, mine, first in differing[:_MAX_DIFFERENCES]
            )
            raise RankMismatchError(
                f"differs from {kind} 0 on host {hosts[0]} in {pairs} on {kind} 0{more}; make them the same on all "
                "machines",
                rank,
                hosts[rank],
            )


def differences(mine: Any, other: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Lists (key, value in mine, value in other) where they differ. The keys of nested dictionaries are dotted."""
    if isinstance(mine, Mapping) and isinstance(other, Mapping):
        keys = [*mine, *(name for name in other if name not in mine)]
        return [
            difference
            for name in keys
            for difference in differences(
                mine.get(name, "nothing"), other.get(name, "nothing"), f"{key}.{name}" if key else str(name)
            )
        ]
    return [] if mine == other else [(key, mine, other)]


def _truncate(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 3]}..."
