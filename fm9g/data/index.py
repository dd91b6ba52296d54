"""Reading an indexed dataset: a folder with data.jsonl and the byte bounds of its lines.

The bounds are N+1 offsets, from 0 to the size of data.jsonl. The published converter wrote only the N line ends;
such an index (its first value is not 0) is read as if a 0 stood in front.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fm9g.data.records import parse_object, quote
from fm9g.data.shapes import BadRecord
from fm9g.errors import UserError

DATA, INDEX, INDEX_H5, META = "data.jsonl", "index", "index.h5", "meta.json"
_PAGE, _PAGES = 4096, 64


class IndexedDataset:
    """The records of one dataset folder, by number. Opening reads no record and, from index.h5, no list of bounds."""

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError where a file is missing or the index was made from other data."""
        self.folder = Path(folder)
        self._data = self.folder / DATA
        if not self._data.is_file():
            raise UserError(
                f"{self.folder}: no indexed dataset here ({DATA} is missing); make one with `fm9g data index`"
            )
        status = self._data.stat()
        self.nbytes, self.modified = status.st_size, status.st_mtime_ns
        self._ends = self._read_index()
        if len(self._ends) and self._ends[0] == 0:
            self._ends = self._ends[1:]
        if not len(self._ends):
            raise UserError(f"{self.folder}: the dataset is empty")
        if self._ends[-1] != self.nbytes:
            raise UserError(
                f"{self.folder}: the index ends at byte {self._ends[-1]}, {DATA} at {self.nbytes}: "
                "one of them was changed; index it again with `fm9g data index`"
            )
        self._file = os.open(self._data, os.O_RDONLY)

    def _read_index(self) -> np.ndarray:
        h5, text = self.folder / INDEX_H5, self.folder / INDEX
        try:
            if h5.is_file():
                with h5py.File(h5, "r") as file:
                    dataset = file["index"]
                    offset = dataset.id.get_offset()
                    if offset is None:  # chunked or compressed: not one stretch of the file
                        return dataset[:].astype(np.int64)
                    return np.memmap(h5, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)
            if text.is_file():
                return np.loadtxt(text, dtype=np.int64, ndmin=1)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self.folder}: the index cannot be read: {error}; index it again") from None
        raise UserError(f"{self.folder}: neither {INDEX_H5} nor {INDEX} is there; index it with `fm9g data index`")

    def checksum(self) -> str:
        """Of pages spread over the data: noticing another content costs no reading of it all."""
        places = range(0, self.nbytes, max(_PAGE, self.nbytes // _PAGES))
        value = 0
        for place in places:
            value = zlib.crc32(os.pread(self._file, _PAGE, place), value)
        return f"{value:08x}"

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Record `number`, from 0. Raises UserError where the index does not match the data, or the line is bad."""
        line = self.line(number)
        try:
            return parse_object(line)
        except BadRecord as error:
            raise UserError(f"{self._data}, line {number + 1}: {error}: {quote(line)}") from None

    def line(self, number: int) -> bytes:
        """The stored line of record `number`. Raises UserError where the index does not match the data."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = int(self._ends[number - 1]) if number else 0
        line = os.pread(self._file, max(0, int(self._ends[number]) - start), start)
        if (line[-1:] != b"\n" and number + 1 < len(self)) or line.count(b"\n", 0, -1):
            where = f"{self._data}, line {number + 1}"
            raise UserError(f"{where}: the index does not match the data; index it again with `fm9g data index`")
        return line

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
