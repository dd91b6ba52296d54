"""JSON files, in which each key of an object may appear once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular

_MAX_BYTES = 64 << 20  # the weight lists of the largest models take a few MB


class DuplicateKeyError(Exception):
    """A JSON object has a key twice. The argument is the key."""

    @property
    def key(self) -> str:
        return str(self.args[0])


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Use as object_pairs_hook. Raises DuplicateKeyError for a repeated key: readers differ in which one wins."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return content


def read_json(path: Path, is_input: bool = True) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        is_input: whether fm9g.io.inputs protects it from being replaced; False for what a run wrote itself.

    Raises UserError with file, line and column for anything that is not JSON, and for a repeated key.
    """
    if is_input:
        register_input(path)
    check_regular(path, _MAX_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=reject_duplicate_keys)
    except DuplicateKeyError as error:
        raise UserError(f"{path}: key {error.key!r} is given twice; keep one of them") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_object(path: Path, is_input: bool = True) -> dict[str, Any]:
    """The same for a file that contains one JSON object."""
    content = read_json(path, is_input)
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object {{...}}")
    return content
