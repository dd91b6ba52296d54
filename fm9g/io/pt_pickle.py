"""Finds code in the pickles of weight files without running it, to name it in the error message.

torch refuses to run it, too (weights_only=True), but its message explains how to run it anyway.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from torch import _weights_only_unpickler

from fm9g.io.pt_archive import ZIP_MAGIC, read_pickle

_LEGACY_PICKLES = 5  # at the start of a file from before torch 1.6
_MAX_LEGACY_BYTES = 1 << 26  # bytes of such a file that are searched


def find_code(path: Path) -> str:
    """The first function or class in a weight file that tensors do not need, such as `os.system`; empty if none."""
    known = _weights_only_unpickler._get_allowed_globals()
    for name in _imports(path):
        if name not in known and all(
            map(str.isidentifier, name.split("."))
        ):  # else the file is a text that starts like a pickle
            return name
    return ""


def _imports(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        start = file.read(_MAX_LEGACY_BYTES)
    content = BytesIO(read_pickle(path) if start.startswith(ZIP_MAGIC) else start)
    try:
        for _ in range(_LEGACY_PICKLES):
            yield from _imports_of_one(content)
    except (ValueError, LookupError, OverflowError):  # the next bytes are not a pickle
        return


def _imports_of_one(content: BinaryIO) -> Iterator[str]:
    """The imports of a pickle, as `module.name`. Reads content up to the end of the pickle."""
    texts: list[str] = []  # pushed so far; STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    top = ""  # the last pushed object, if it is a text
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    for operation, argument, _ in operations:
        if operation.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".", 1)
        elif operation.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        if operation.name == "MEMOIZE":
            memo[len(memo)] = top
        elif operation.name.endswith("PUT"):
            memo[argument] = top
        else:
            top = argument if isinstance(argument, str) else ""
            if operation.name.endswith("GET"):
                top = memo.get(argument, "")
            texts += [top] if top else []
