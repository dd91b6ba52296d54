"""What a command reads, so that nothing it writes takes the place of it.

Whatever opens a file that the user gave calls `note_input`; whatever puts a file or a folder in place (fm9g.files)
calls `check_output`. No command lists its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fm9g.errors import UserError

_noted: set[str] = set()  # real paths
_depth = 0  # of keep_inputs


@contextmanager
def keep_inputs() -> Iterator[None]:
    """What is noted inside is never replaced inside: for one command, or one call of the library.

    Outside, nothing is noted: a program may make B of A with one call, and A of B with the next.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _noted.clear()


def note_input(path: str | Path) -> None:
    """Says that a file is read, or a folder with all that is in it."""
    if _depth:
        _noted.add(os.path.realpath(path))  # Path.resolve() fails on a loop of links


def check_output(target: Path) -> None:
    """Raises UserError where something that was noted would be lost if `target` were replaced."""
    real = os.path.realpath(target)
    if not os.path.exists(real):
        return
    for noted in sorted(_noted):  # a copy: other threads may be reading
        if noted == real:
            held = "is read"
        elif _holds(real, noted):
            held = f"holds {noted}, which is read"
        elif _holds(noted, real):
            held = f"is part of {noted}, which is read"
        else:
            continue
        raise UserError(f"{target}: {held}; choose another place for what is written")


def _holds(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
