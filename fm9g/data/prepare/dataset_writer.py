"""Writes the files of an indexed dataset while its records arrive."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import orjson

from fm9g.data.dataset_files import (
    AS_IS,
    CANONICAL_FORM,
    CANONICAL_FORM_KEY,
    DATA_FILE,
    INDEX_FILE,
    INDEX_H5_FILE,
    META_FILE,
    RECORD_FORMATS_KEY,
)
from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT
from fm9g.data.prepare.line_batch import BUCKETS, LAST_BUCKET, LineBatch
from fm9g.data.prepare.records import parse_object
from fm9g.io.append import AppendWriter

_H5_BLOCK = 1 << 20  # offsets that are copied to index.h5 at a time
_MAX_SAMPLE_CHARACTERS = 50  # of a string of data_sample in meta.json
_MAX_SAMPLE_DEPTH = 8


class DatasetWriter:
    """Writes data.jsonl, index, index.h5 and meta.json to a folder. A context manager, which closes the files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._files = folder, ExitStack()
        self._data = self._files.enter_context(AppendWriter(folder / DATA_FILE, buffer_bytes=4 << 20))
        self._index = self._files.enter_context(AppendWriter(folder / INDEX_FILE))
        self._offsets_path = folder / "bounds"  # copied to index.h5 at the end, when its size is known
        self._offsets = self._files.enter_context(AppendWriter(self._offsets_path))
        self._units, self._sample = 0, b""
        self._buckets = np.zeros(len(BUCKETS) + 1, np.int64)
        self.num_lines = self.num_bytes = 0
        self._add_offsets(np.zeros(1, np.int64))

    def add(self, batch: LineBatch, path: str) -> None:
        """Appends lines. path: the file that the offsets in `batch.chunks` belong to."""
        for chunk in batch.chunks:
            if isinstance(chunk, bytes):
                self._data.write(chunk)
            else:
                start, end = chunk
                self._data.copy(path, start, end - start, in_kernel=False)
        for lengths in batch.lengths:
            offsets = self.num_bytes + np.cumsum(lengths)
            self._add_offsets(offsets)
            self.num_lines, self.num_bytes = self.num_lines + len(offsets), int(offsets[-1])
        self._units += batch.units
        self._buckets += batch.buckets
        self._sample = self._sample or batch.sample

    def _add_offsets(self, offsets: np.ndarray) -> None:
        self._offsets.write(offsets.tobytes())
        numbers = orjson.dumps(offsets, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].replace(b",", b"\n")
        self._index.write(numbers + b"\n")

    def finish(self, language: str, record_formats: dict[str, int]) -> dict[str, Any]:
        """Closes the files and writes meta.json. Returns its content.

        record_formats: number of records by format.
        """
        self._files.close()
        with h5py.File(self._folder / INDEX_H5_FILE, "w") as file, self._offsets_path.open("rb") as offsets:
            dataset = file.create_dataset("index", (self.num_lines + 1,), np.int64)
            for start in range(0, self.num_lines + 1, _H5_BLOCK):
                dataset[start : start + _H5_BLOCK] = np.fromfile(offsets, np.int64, _H5_BLOCK)
        self._offsets_path.unlink()
        meta = {
            "language": language,
            "nlines": self.num_lines,
            "nbytes": self.num_bytes,
            "length_distribute": dict(zip([*BUCKETS, LAST_BUCKET], self._buckets.tolist())),
            "avg_token_per_line": self._units * TOKENS_PER_UNIT[language] / self.num_lines,
            "data_sample": {key: _truncate(value) for key, value in parse_object(self._sample).items()},
            RECORD_FORMATS_KEY: record_formats,
            **({} if AS_IS in record_formats else {CANONICAL_FORM_KEY: CANONICAL_FORM}),
        }
        (self._folder / META_FILE).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        return meta

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)


def _truncate(value: Any, depth: int = _MAX_SAMPLE_DEPTH) -> Any:
    """A value with long strings and deep levels cut."""
    if isinstance(value, list):
        return [_truncate(item, depth - 1) for item in value] if depth else ["..."]
    if isinstance(value, dict):
        return {key: _truncate(item, depth - 1) for key, item in value.items()} if depth else {"...": "..."}
    is_long = isinstance(value, str) and len(value) > _MAX_SAMPLE_CHARACTERS
    return value[:_MAX_SAMPLE_CHARACTERS] + "..." if is_long else value
