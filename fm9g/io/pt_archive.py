"""Checks the zip archive of a .pt file before torch reads it.

torch trusts the directory of an archive: it allocates and inflates whatever size a record claims. These checks compare
the directory with the bytes of the file and with what torch.save writes.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fm9g.errors import UserError

ZIP_MAGIC = (
    b"PK\x03\x04"  # torch takes a file that begins so for an archive, any other one for pickles (before torch 1.6)
)
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # of a record: the magic, ..., the lengths of its name and of its extra field
_MAX_METADATA = 1 << 20  # bytes of a small record, such as `version` and `byteorder`
_MAX_PICKLE, _MAX_PICKLE_PER_STORAGE = 1 << 22, 1 << 12  # bytes of data.pkl, which holds names and shapes
_MAX_INFLATED, _MAX_RATIO = 1 << 26, 20  # compressed records inflate to so many bytes, or to so many times their own
# What reading a damaged archive raises. A method of compression that is not known is a RuntimeError.
_DAMAGED = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class PtArchive:
    """sizes: offset of a record's content in the file -> its bytes there.
    is_plain: records are neither compressed nor of the other byte order, so that they can be mapped."""

    sizes: dict[int, int]
    is_plain: bool


def check_archive(path: Path) -> PtArchive | None:
    """The archive of a .pt file; None where the file is none.

    Raises UserError if it is cut short, or if torch.save cannot have written it.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                offsets = [_data_offset(file, record) for record in records]
                problem = _problem(records, offsets, archive.start_dir)
                orders = (
                    []
                    if problem
                    else [archive.read(record) for record in records if _record_key(record) == "byteorder"]
                )
        except _DAMAGED:
            raise UserError(f"{path}: not a whole weight file (it is cut short); get or write it again") from None
        size = file.seek(0, 2)
    if problem:
        raise UserError(f"{path}: refused: {problem}; torch.save writes no such file. Get it again")
    return PtArchive(
        sizes={offset: min(record.file_size, size - offset) for record, offset in zip(records, offsets)},
        is_plain=set(orders) <= {b"little"} and not any(map(_is_compressed, records)),
    )


def read_pickle(path: Path) -> bytes:
    """The record data.pkl of an archive that check_archive accepts; empty where it has none, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return b"".join(archive.read(record) for record in archive.infolist() if _record_key(record) == "data.pkl")
    except _DAMAGED:
        return b""


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the content of a record begins in the file."""
    file.seek(record.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != ZIP_MAGIC:
        raise zipfile.BadZipFile
    return record.header_offset + _LOCAL_HEADER.size + name + extra


def _record_key(record: zipfile.ZipInfo) -> str:
    """Its name without the archive's own, which is in front of each."""
    return record.filename.partition("/")[2]


def _is_compressed(record: zipfile.ZipInfo) -> bool:
    return record.compress_type != zipfile.ZIP_STORED


def _problem(records: list[zipfile.ZipInfo], offsets: list[int], end: int) -> str:
    """What torch.save would not write, in words; empty where there is nothing. end: where the directory begins."""
    return _name_problem(records) or _overlap_problem(records, offsets, end) or _size_problem(records)


def _name_problem(records: list[zipfile.ZipInfo]) -> str:
    names: set[str] = set()
    for record in records:
        name = record.orig_filename
        if name in names:
            return f"its record {name} is there twice"
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
            return f"it has a record called {name}"
        names.add(name)
    return ""


def _overlap_problem(records: list[zipfile.ZipInfo], offsets: list[int], end: int) -> str:
    last = 0
    for offset, record in sorted(zip(offsets, records), key=lambda pair: pair[0]):
        if record.header_offset < last:
            return f"its record {record.filename} overlaps another one"
        last = offset + record.compress_size
        if last > end:
            return f"its record {record.filename} claims {record.compress_size} bytes, more than the file has"
    return ""


def _size_problem(records: list[zipfile.ZipInfo]) -> str:
    storages = sum(_record_key(record).startswith("data/") for record in records)
    for record in records:
        max_size = (
            _MAX_PICKLE + storages * _MAX_PICKLE_PER_STORAGE if _record_key(record) == "data.pkl" else _MAX_METADATA
        )
        if record.file_size > max_size and not _record_key(record).startswith("data/"):
            return f"its record {record.filename} claims {record.file_size} bytes, where {max_size} are the most"
    compressed = list(filter(_is_compressed, records))
    packed = sum(record.compress_size for record in compressed)
    inflated = sum(record.file_size for record in compressed)
    if inflated > max(_MAX_INFLATED, _MAX_RATIO * packed):
        return f"its {packed} compressed bytes would inflate to {inflated}"
    return ""
