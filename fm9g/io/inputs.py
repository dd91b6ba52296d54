"""The inputs of a command, so that none of its outputs replaces one.

Code that opens a user's file calls `register_input`; code that puts a file or folder in place (fm9g.io.atomic) calls
`check_output`. So no command has to list its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fm9g.errors import UserError

_registered: set[str] = set()  # real paths
_depth = 0  # of nested protect_inputs


@contextmanager
def protect_inputs() -> Iterator[None]:
    """Protects the inputs registered in the block from being replaced in it: for one command, or one library call.

    Outside such a block nothing is registered: a program may convert A to B with one call, and B to A with the next.
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
    """Registers a file that is read, or a folder with everything in it."""
    if _depth:
        _registered.add(os.path.realpath(path))  # Path.resolve() fails on a loop of links


def check_output(target: Path) -> None:
    """Raises UserError if replacing `target` would destroy a registered input."""
    real = os.path.realpath(target)
    if not os.path.exists(real):
        return
    for registered in sorted(_registered):  # a copy: other threads may be reading
        if registered == real:
            conflict = "is an input"
        elif _contains(real, registered):
            conflict = f"contains {registered}, which is an input"
        elif _contains(registered, real):
            conflict = f"is part of {registered}, which is an input"
        else:
            continue
        raise UserError(f"{target}: {conflict}; choose another place for the output")


def _contains(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
