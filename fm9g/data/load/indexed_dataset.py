"""Reading an indexed dataset: a folder with data.jsonl and the byte offsets of its lines.

    data.jsonl   | {"input": ... } | {"input": ... } | {"input": ... } |
    index        0                27                54                81      N + 1 offsets of N lines

The published converter wrote only the N line ends. Such an index, whose first value is not 0, is read as if it began
with a 0.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fm9g.config.fields import did_you_mean
from fm9g.data.dataset_files import DATA_FILE, INDEX_FILE, INDEX_H5_FILE, SPLITS, has_canonical_records
from fm9g.data.load.record_sample import ALL_RECORDS, RecordSample
from fm9g.data.prepare.record_size import MAX_RECORD_BYTES
from fm9g.data.prepare.records import parse_object, quote
from fm9g.data.prepare.values import BadRecord
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.open_files import is_too_many_open_files, too_many_open_files
from fm9g.io.random_access import RandomAccessFile
from fm9g.path_kind import DATASET, check_kind

_PAGE_BYTES, _NUM_PAGES = 4096, 64  # of a checksum
_MAX_MEASURED = 1 << 20  # records whose length is looked up

ReadOffsets = Callable[[int, int], np.ndarray]  # (first, count) -> `count` stored offsets


class IndexedDataset:
    """The records of one dataset folder, by index. Opening reads no record and, from index.h5, not the offsets."""

    def __init__(
        self,
        folder: str | Path,
        max_records: int = 0,
        max_record_bytes: int = MAX_RECORD_BYTES,
        sample: RecordSample = ALL_RECORDS,
    ) -> None:
        """Opens the folder.

        Args:
            max_records: number of records to use, from the first of the sample; 0: all.
            max_record_bytes: refuse a longer record.
            sample: the records to use; default: all, in the order of the file.

        Raises UserError if a file is missing or the index belongs to other data.
        """
        self.folder = Path(folder)
        self._data, self._max_record_bytes = self.folder / DATA_FILE, max_record_bytes
        check_kind(self.folder, DATASET)
        if not self._data.is_file():
            if found := [split for split in SPLITS if (self.folder / split / DATA_FILE).is_file()]:
                raise UserError(
                    f"{self.folder}: contains the datasets {' and '.join(found)}; give {self.folder / found[0]}"
                )
            raise UserError(
                f"{self.folder}: no indexed dataset here ({DATA_FILE} is missing); make one with `fm9g data index`"
                f"{did_you_mean(self.folder.name, _sibling_datasets(self.folder))}"
            )
        status = self._data.stat()
        self.nbytes, self.mtime_ns = status.st_size, status.st_mtime_ns
        self.is_canonical = has_canonical_records(self.folder)
        self._files: list[RandomAccessFile] = []
        size, self._read_offsets = self._open_index()
        self._starts_with_0 = bool(size) and self._read_offsets(0, 1)[0] == 0
        self.num_stored = int(size - self._starts_with_0)  # without the sample and the limit of max_records
        if not self.num_stored:
            raise UserError(f"{self.folder}: the dataset is empty")
        if (end := int(self._read_offsets(size - 1, 1)[0])) != self.nbytes:
            raise UserError(
                f"{self.folder}: the index ends at byte {end}, {DATA_FILE} at {self.nbytes}: "
                "one of them was changed; index it again with `fm9g data index`"
            )
        self._file = self._open(self._data)
        self.sample = sample
        self._record_at = sample.order(self.num_stored) if sample else None
        if not (size := sample.size(self.num_stored)):
            raise UserError(f"{self.folder}: sample_skip {sample.skip} leaves none of its {self.num_stored} records")
        self._num_records = min(max_records or size, size)

    def _open(self, path: Path) -> RandomAccessFile:
        self._files.append(RandomAccessFile(path))
        return self._files[-1]

    def _open_index(self) -> tuple[int, ReadOffsets]:
        """How many offsets the index has, and a function that reads some."""
        h5, text = self.folder / INDEX_H5_FILE, self.folder / INDEX_FILE
        if not (h5.is_file() or text.is_file()):
            raise UserError(
                f"{self.folder}: found neither {INDEX_H5_FILE} nor {INDEX_FILE}; index it with `fm9g data index`"
            )
        try:
            register_input(h5 if h5.is_file() else text)
            if h5.is_file():
                return self._open_h5(h5)
            offsets = np.array(text.read_bytes().split(), dtype=np.int64)
            return len(offsets), lambda first, count: offsets[first : first + count]
        except (OSError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            if is_too_many_open_files(error):
                raise too_many_open_files(h5) from None
            raise UserError(f"{self.folder}: the index cannot be read: {error}; index it again") from None

    def _open_h5(self, path: Path) -> tuple[int, ReadOffsets]:
        with h5py.File(path, "r") as file:
            dataset = file["index"]
            if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
                raise ValueError("it is no list of integers")
            start, dtype, size = dataset.id.get_offset(), dataset.dtype, len(dataset)
            if start is None:  # chunked or compressed, so not contiguous in the file
                offsets = dataset[:]
                return size, lambda first, count: offsets[first : first + count]
        # Read from the file, not mapped: pages that random reads touch would stay in memory.
        index, width = self._open(path), dtype.itemsize
        if path.stat().st_size < start + size * width:
            raise ValueError("it is truncated")
        return size, lambda first, count: np.frombuffer(index.read(count * width, start + first * width), dtype)

    @property
    def used_bytes(self) -> float:
        """Bytes of the records that are used, about."""
        return self.nbytes * len(self) / self.num_stored

    def checksum(self) -> str:
        """A checksum of pages spread over the data: it notices other content without reading all of it."""
        value = 0
        for offset in range(0, self.nbytes, max(_PAGE_BYTES, self.nbytes // _NUM_PAGES)):
            value = zlib.crc32(self._file.read(_PAGE_BYTES, offset), value)
        if self.sample:
            value = zlib.crc32(repr(self.sample).encode(), value)
        return f"{value:08x}"

    def __len__(self) -> int:
        return self._num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`, from 0. Raises UserError if the index does not match the data, or the line is no object."""
        line = self.line(index)
        try:
            return parse_object(line)
        except BadRecord as error:
            raise UserError(f"{self._data}, line {self.line_number(index)}: {error}: {quote(line)}") from None

    def longest(self, count: int) -> list[int]:
        """The records with the most bytes, the longest first; of a large dataset, those among its first million."""
        size = min(len(self), _MAX_MEASURED)
        if self._record_at is not None:
            lengths = np.array([len(self.line(index)) for index in range(size)])
        else:
            ends = self._read_offsets(0, size + self._starts_with_0)
            lengths = np.diff(ends) if self._starts_with_0 else np.diff(ends, prepend=0)
        return [int(index) for index in np.argsort(-lengths, kind="stable")[:count]]

    def line_number(self, index: int) -> int:
        """The line of record `index` in the data, from 1."""
        return (index if self._record_at is None else self._record_at(index)) + 1

    def line(self, index: int) -> bytes:
        """The stored line of record `index`. Raises UserError if the index does not match the data."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = self.line_number(index) - 1
        if self._starts_with_0 or index:
            start, end = self._read_offsets(index - (not self._starts_with_0), 2).tolist()
        else:
            start, end = 0, int(self._read_offsets(0, 1)[0])
        where = f"{self._data}, line {index + 1}"
        if end - start > self._max_record_bytes:
            raise UserError(
                f"{where}: has {(end - start) >> 20} MB, but a record at most {self._max_record_bytes >> 20} MB; "
                "divide it, or leave it out"
            )
        line = self._file.read(end - start, start) if 0 <= start <= end <= self.nbytes else b""
        if not line or (line[-1:] != b"\n" and index + 1 < self.num_stored) or line.count(b"\n", 0, -1):
            raise UserError(f"{where}: the index does not match the data; index it again with `fm9g data index`")
        return line

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # then modules that `close` needs may be gone
            for file in getattr(self, "_files", ()):
                file.close()


def _sibling_datasets(folder: Path) -> list[str]:
    return [file.parent.name for file in folder.parent.glob(f"*/{DATA_FILE}")]
