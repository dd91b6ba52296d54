"""Reading an indexed dataset: a folder with data.jsonl and the byte bounds of its lines.

The bounds are N+1 offsets, from 0 to the size of data.jsonl. The published converter wrote only the N line ends;
such an index (its first value is not 0) is read as if a 0 stood in front.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fm9g.config.fields import did_you_mean
from fm9g.data.prepare import sources
from fm9g.data.prepare.record_formats import BadRecord
from fm9g.data.prepare.records import parse_object, quote
from fm9g.errors import UserError
from fm9g.io.atomic import RandomAccessFile, is_too_many_open_files, too_many_open_files
from fm9g.io.inputs import register_input
from fm9g.io.path_kind import DATASET, check_kind

DATA_FILE, INDEX_FILE, INDEX_H5_FILE, META_FILE = "data.jsonl", "index", "index.h5", "meta.json"
_PAGE_BYTES, _NUM_PAGES = 4096, 64


def _sibling_datasets(folder: Path) -> list[str]:
    return [file.parent.name for file in folder.parent.glob(f"*/{DATA_FILE}")]


class IndexedDataset:
    """The records of one dataset folder, by number. Opening reads no record and, from index.h5, no list of bounds."""

    def __init__(self, folder: str | Path, max_records: int = 0) -> None:
        """max_records: only the first so many records; 0: all.

        Raises UserError where a file is missing or the index was made from other data.
        """
        self.folder = Path(folder)
        self._data = self.folder / DATA_FILE
        check_kind(self.folder, DATASET)
        if not self._data.is_file():
            raise UserError(
                f"{self.folder}: no indexed dataset here ({DATA_FILE} is missing); make one with `fm9g data index`"
                f"{did_you_mean(self.folder.name, _sibling_datasets(self.folder))}"
            )
        status = self._data.stat()
        self.nbytes, self.mtime_ns = status.st_size, status.st_mtime_ns
        self._files: list[RandomAccessFile] = []
        size, self._read_offsets = self._open_index()
        # Whether the first bound is written down, or is meant (the published converter's).
        self._starts_with_0 = bool(size) and self._read_offsets(0, 1)[0] == 0
        self._num_records = size - self._starts_with_0
        if not self._num_records:
            raise UserError(f"{self.folder}: the dataset is empty")
        if (end := int(self._read_offsets(size - 1, 1)[0])) != self.nbytes:
            raise UserError(
                f"{self.folder}: the index ends at byte {end}, {DATA_FILE} at {self.nbytes}: "
                "one of them was changed; index it again with `fm9g data index`"
            )
        self._file = self._open(self._data)
        self.num_stored = self._num_records  # of all records
        self._num_records = min(max_records or self.num_stored, self.num_stored)

    def _open(self, path: Path) -> RandomAccessFile:
        self._files.append(RandomAccessFile(path))
        return self._files[-1]

    def _open_index(self) -> tuple[int, Callable[[int, int], np.ndarray]]:
        """How many numbers the index has, and a function that reads some: (first, count)."""
        h5, text = self.folder / INDEX_H5_FILE, self.folder / INDEX_FILE
        if not (h5.is_file() or text.is_file()):
            raise UserError(
                f"{self.folder}: neither {INDEX_H5_FILE} nor {INDEX_FILE} is there; index it with `fm9g data index`"
            )
        try:
            register_input(h5 if h5.is_file() else text)
            if h5.is_file():
                with h5py.File(h5, "r") as file:
                    dataset = file["index"]
                    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
                        raise ValueError("it is no list of whole numbers")
                    offset, dtype, size = dataset.id.get_offset(), dataset.dtype, len(dataset)
                    values = dataset[:] if offset is None else None  # chunked or compressed: not one stretch
                if values is None:
                    # Read where they are, not mapped: pages that random reads touch would pile up in memory.
                    index, width = self._open(h5), dtype.itemsize
                    if h5.stat().st_size < offset + size * width:
                        raise ValueError("it is cut short")
                    return size, lambda i, n: np.frombuffer(index.read(n * width, offset + i * width), dtype)
            else:
                values = np.array(text.read_bytes().split(), dtype=np.int64)
        except OSError as error:
            if is_too_many_open_files(error):
                raise too_many_open_files(h5) from None
            raise UserError(f"{self.folder}: the index cannot be read: {error}; index it again") from None
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{self.folder}: the index cannot be read: {error}; index it again") from None
        return len(values), lambda i, n: values[i : i + n]

    def checksum(self) -> str:
        """Of pages spread over the data: noticing another content costs no reading of it all."""
        offsets = range(0, self.nbytes, max(_PAGE_BYTES, self.nbytes // _NUM_PAGES))
        value = 0
        for offset in offsets:
            value = zlib.crc32(self._file.read(_PAGE_BYTES, offset), value)
        return f"{value:08x}"

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`, from 0. Raises UserError where the index does not match the data, or the line is bad."""
        line = self.line(index)
        try:
            return parse_object(line)
        except BadRecord as error:
            raise UserError(f"{self._data}, line {index + 1}: {error}: {quote(line)}") from None

    def line(self, index: int) -> bytes:
        """The stored line of record `index`. Raises UserError where the index does not match the data."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._starts_with_0 or index:
            start, end = self._read_offsets(index - (not self._starts_with_0), 2).tolist()
        else:
            start, end = 0, int(self._read_offsets(0, 1)[0])
        if end - start > sources.MAX_RECORD_BYTES:
            raise UserError(
                f"{self._data}, line {index + 1}: has {(end - start) >> 20} MB, and a record at most "
                f"{sources.MAX_RECORD_BYTES >> 20}; divide it, or leave it out"
            )
        line = self._file.read(end - start, start) if 0 <= start <= end <= self.nbytes else b""
        if not line or (line[-1:] != b"\n" and index + 1 < self.num_stored) or line.count(b"\n", 0, -1):
            where = f"{self._data}, line {index + 1}"
            raise UserError(f"{where}: the index does not match the data; index it again with `fm9g data index`")
        return line

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            file.close()
