"""A token cache: the encoded records of a dataset on disk, so that they are encoded once and then only read.

A folder with tokens (int32, the marked tokens of all records end to end), bounds (int64, N+1 places among them) and
cache.json, which says what they were made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.errors import UserError
from fm9g.io.atomic import AppendWriter, atomic_dir, is_too_many_open_files, stat_signature, too_many_open_files
from fm9g.progress import Progress

_TOKENS, _OFFSETS, _KEY = "tokens", "bounds", "cache.json"
_FILES = {_TOKENS, _OFFSETS, _KEY}


class TokenCache:
    """The marked tokens of each record of a dataset, memory-mapped, and copied when they are read.

    Python dies without a word where a mapped file has become shorter.
    """

    def __init__(self, folder: Path, records: int) -> None:
        """Raises UserError for a folder that is not whole."""
        self._folder, self._files = folder, (folder / _TOKENS, folder / _OFFSETS)
        try:
            self._status = [stat_signature(file.stat()) for file in self._files]
            self._tokens, self._offsets = (
                _memory_map(folder / _TOKENS, np.int32),
                _memory_map(folder / _OFFSETS, np.int64),
            )
        except (OSError, ValueError) as error:
            if is_too_many_open_files(error):
                raise too_many_open_files(folder) from None
            raise UserError(f"{folder}: the token cache cannot be read: {error}; delete it") from None
        if len(self._offsets) != records + 1 or self._offsets[-1] != len(self._tokens):
            raise UserError(f"{folder}: the token cache is not whole; delete it")

    def read(self, record_indices: np.ndarray) -> list[np.ndarray]:
        """The marked tokens of records. Raises UserError where the files were changed."""
        try:
            changed = [stat_signature(file.stat()) for file in self._files] != self._status
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; the run was reading it") from None
        if changed:
            raise UserError(f"{self._folder}: the token cache was changed while it was read; start again")
        tokens = self._tokens
        starts, ends = self._offsets[record_indices].tolist(), self._offsets[record_indices + 1].tolist()
        return [tokens[start:end].copy() for start, end in zip(starts, ends)]


def _memory_map(file: Path, dtype: type) -> np.ndarray:
    # A plain array over the map: a slice of it costs a fifth of a slice of a memmap. Nothing cannot be mapped.
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.empty(0, dtype)


def cache_mismatches(folder: Path, key: dict[str, Any]) -> list[str] | None:
    """What differs between `key` and what a cache was made from, a line each; None where there is no cache."""
    try:
        made_from = json.loads((folder / _KEY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        made_from = None
    if not isinstance(made_from, dict):
        return [f"{folder / _KEY} cannot be read"]
    return [f"{name}: was {made_from.get(name)}, is {key[name]}" for name in key if made_from.get(name) != key[name]]


def write_cache(folder: Path, key: dict[str, Any], records: Iterable[list[np.ndarray]], size: int) -> None:
    """Makes a cache of `size` records, given in order in chunks. It appears under its name only when whole.

    Raises UserError where the folder holds anything but a cache.
    """
    if folder.exists() and not (folder.is_dir() and {file.name for file in folder.iterdir()} <= _FILES):
        raise UserError(
            f"{folder}: holds something else than a token cache; choose another folder for --token_cache_dir"
        )
    end = 0
    with atomic_dir(folder, overwrite=True) as new:
        with (
            AppendWriter(new / _TOKENS, 4 << 20) as tokens,
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
