"""What a command reads, so that nothing it writes takes the place of it.

Whatever opens a file that the user gave calls `register_input`; whatever puts a file or a folder in place
(fm9g.io.atomic) calls `check_output`. No command lists its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fm9g.errors import UserError

_registered: set[str] = set()  # real paths
_depth = 0  # of protect_inputs


@contextmanager
def protect_inputs() -> Iterator[None]:
    """What is registered inside is never replaced inside: for one command, or one call of the library.

    Outside, nothing is registered: a program may make B of A with one call, and A of B with the next.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _registered.clear()


def register_input(path: str | Path) -> None:
    """Says that a file is read, or a folder with all that is in it."""
    if _depth:
        _registered.add(os.path.realpath(path))  # Path.resolve() fails on a loop of links


def check_output(target: Path) -> None:
    """Raises UserError where something that was registered would be lost if `target` were replaced."""
    real = os.path.realpath(target)
    if not os.path.exists(real):
        return
    for registered in sorted(_registered):  # a copy: other threads may be reading
        if registered == real:
            conflict = "is read"
        elif _contains(real, registered):
            conflict = f"holds {registered}, which is read"
        elif _contains(registered, real):
            conflict = f"is part of {registered}, which is read"
        else:
            continue
        raise UserError(f"{target}: {conflict}; choose another place for what is written")


def _contains(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
