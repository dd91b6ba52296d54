"""A token cache: the token arrays of a dataset's records on disk, encoded once and then only read.

A folder of three files, for N records:

    tokens        int32    | record 0 | record 1 |     ... | record N-1 |
    bounds        int64    0          5          9         ...          len(tokens)      N + 1 offsets
    cache.json             what the cache was built from, see Mixture.cache_key
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.errors import UserError
from fm9g.io.append import AppendWriter
from fm9g.io.atomic import atomic_dir
from fm9g.io.open_files import is_too_many_open_files, too_many_open_files
from fm9g.io.random_access import stat_signature
from fm9g.progress import Progress

_TOKENS, _OFFSETS, _KEY = "tokens", "bounds", "cache.json"
_FILES = {_TOKENS, _OFFSETS, _KEY}


class TokenCache:
    """Reads the token arrays of records from memory-mapped files.

    Each read first checks that the files are unchanged, because reading a truncated mapping kills the process.
    """

    def __init__(self, folder: Path, records: int) -> None:
        """Raises UserError if the cache is incomplete or unreadable."""
        self._folder, self._files = folder, (folder / _TOKENS, folder / _OFFSETS)
        try:
            self._signatures = [stat_signature(file.stat()) for file in self._files]
            self._tokens, self._offsets = (
                _memory_map(folder / _TOKENS, np.int32),
                _memory_map(folder / _OFFSETS, np.int64),
            )
        except (OSError, ValueError) as error:
            if is_too_many_open_files(error):
                raise too_many_open_files(folder) from None
            raise UserError(f"{folder}: the token cache cannot be read: {error}; delete it") from None
        if len(self._offsets) != records + 1 or self._offsets[-1] != len(self._tokens):
            raise UserError(f"{folder}: the token cache is incomplete; delete it")

    def read(self, record_indices: np.ndarray) -> list[np.ndarray]:
        """Copies of the token arrays of records. Raises UserError if the files were changed."""
        try:
            changed = [stat_signature(file.stat()) for file in self._files] != self._signatures
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; the run was reading it") from None
        if changed:
            raise UserError(f"{self._folder}: the token cache was changed while it was read; start again")
        tokens = self._tokens
        starts, ends = self._offsets[record_indices].tolist(), self._offsets[record_indices + 1].tolist()
        return [tokens[start:end].copy() for start, end in zip(starts, ends)]


def _memory_map(file: Path, dtype: type) -> np.ndarray:
    # A plain array over the mapping: slicing it takes a fifth of the time of slicing a memmap. An empty file cannot be
    # mapped.
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.empty(0, dtype)


def cache_mismatches(folder: Path, key: dict[str, Any]) -> list[str] | None:
    """The differences between `key` and the key of a cache, one line each; None if there is no cache."""
    try:
        saved_key = json.loads((folder / _KEY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        saved_key = None
    if not isinstance(saved_key, dict):
        return [f"{folder / _KEY} cannot be read"]
    return [f"{name}: was {saved_key.get(name)}, is {key[name]}" for name in key if saved_key.get(name) != key[name]]


def write_cache(folder: Path, key: dict[str, Any], records: Iterable[list[np.ndarray]], size: int) -> None:
    """Writes a cache of `size` records, given in order in chunks. The folder appears only when the cache is complete.

    Raises UserError if the folder holds anything but a cache.
    """
    if folder.exists() and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= _FILES):
        raise UserError(
            f"{folder}: holds something other than a token cache; choose another folder for --token_cache_dir"
        )
    end = 0
    with atomic_dir(folder, overwrite=True) as new:
        with (
            AppendWriter(new / _TOKENS, buffer_bytes=4 << 20) as tokens,
            AppendWriter(new / _OFFSETS) as offsets,
            Progress(f"token cache {folder.name}", size, "records") as progress,
        ):
            offsets.write(np.zeros(1, np.int64).tobytes())
            for chunk in records:
                ends = end + np.cumsum([len(record) for record in chunk], dtype=np.int64)
                end = int(ends[-1])
                tokens.write(np.concatenate(chunk).tobytes())
                offsets.write(ends.tobytes())
                progress.advance(len(chunk))
        (new / _KEY).write_text(json.dumps(key, indent=1), encoding="utf-8")
