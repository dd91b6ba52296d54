"""Checks the zip archive of a .pt file before torch reads it.

torch trusts the directory of an archive: it allocates and inflates whatever size a record claims. These checks compare
the directory with the bytes of the file and with the limits of what torch.save writes.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from fm9g.errors import UserError

ZIP_MAGIC = b"PK\x03\x04"  # torch reads files that do not start with it as pickles (before torch 1.6)
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # of a record: magic, ..., length of its name, length of its extra field
_MAX_METADATA_BYTES = 1 << 20  # of a small record, such as `version` and `byteorder`
_MAX_PICKLE_BYTES, _MAX_PICKLE_BYTES_PER_STORAGE = 1 << 22, 1 << 12  # of data.pkl, which contains names and shapes
_MAX_INFLATED_BYTES, _MAX_INFLATION = 1 << 26, 20  # compressed records may exceed one of the two limits
# Reading a damaged archive raises these. An unknown compression method is a RuntimeError.
_DAMAGED = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class PtArchive:
    """The archive of a .pt file.

    Attributes:
        locations: name of each record -> offset and bytes of its content in the file.
        is_plain: whether the bytes in the file are those in memory: not compressed, and in this byte order.
    """

    locations: dict[str, tuple[int, int]]
    is_plain: bool


def check_archive(
    path: Path, max_pickle_bytes: int = _MAX_PICKLE_BYTES, max_inflated_bytes: int = _MAX_INFLATED_BYTES
) -> PtArchive | None:
    """The archive of a .pt file; None if the file is not an archive.

    Raises UserError if the file is truncated, or if torch.save cannot have written it.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                offsets = [_data_offset(file, record) for record in records]
                problem = (
                    _name_problem(records)
                    or _overlap_problem(records, offsets, archive.start_dir)
                    or _size_problem(records, max_pickle_bytes, max_inflated_bytes)
                )
                byteorders = [] if problem else [r for r in records if _record_key(r) == "byteorder"]
                orders = {archive.read(record) for record in byteorders}
        except _DAMAGED:
            raise UserError(f"{path}: not a complete weight file (it is truncated); get or write it again") from None
        size = file.seek(0, 2)
    if problem:
        raise UserError(f"{path}: refused: {problem}; torch.save does not write such files. Get it again")
    return PtArchive(
        locations={
            record.filename: (offset, min(record.file_size, size - offset)) for record, offset in zip(records, offsets)
        },
        is_plain=orders <= {b"little"} and not any(map(_is_compressed, records)),
    )


def read_pickle(path: Path) -> bytes:
    """The record data.pkl of an archive that check_archive accepts; empty if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return b"".join(archive.read(record) for record in archive.infolist() if _record_key(record) == "data.pkl")
    except _DAMAGED:
        return b""


def without_values(path: Path, archive: PtArchive) -> tuple[BytesIO, dict[int, tuple[int, int]]]:
    """Copies an archive without the values of its tensors, so that torch reads only names, shapes and types.

    torch has no other way to say exactly where values are: on the meta device it computes the offsets that they have in
    files of torch.save, and other programs place them elsewhere.

    Returns the copy, and the offset of each record in the copy -> offset and bytes of its content in the file. Raises
    UserError if the checksum of a small record is wrong.
    """
    copy = BytesIO()
    try:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
            for record in source.infolist():
                key = _record_key(record)
                if key != ".format_version":  # with this record, torch computes offsets
                    target.writestr(record.filename, b"" if key.startswith("data/") else source.read(record))
    except _DAMAGED:
        raise UserError(f"{path}: not a complete weight file (it is damaged); get or write it again") from None
    with zipfile.ZipFile(copy) as target:
        records = target.infolist()
    offsets = {_data_offset(copy, record): archive.locations[record.filename] for record in records}
    copy.seek(0)
    return copy, offsets


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """The offset of a record's content in the file."""
    file.seek(record.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if magic != ZIP_MAGIC:
        raise zipfile.BadZipFile
    return record.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _record_key(record: zipfile.ZipInfo) -> str:
    """Its name without the name of the archive, which precedes each."""
    return record.filename.partition("/")[2]


def _is_compressed(record: zipfile.ZipInfo) -> bool:
    return record.compress_type != zipfile.ZIP_STORED


def _name_problem(records: list[zipfile.ZipInfo]) -> str:
    names: set[str] = set()
    for record in records:
        name = record.orig_filename
        if name in names:
            return f"it has two records named {name}"
        if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
            return f"it has a record named {name}"
        names.add(name)
    return ""


def _overlap_problem(records: list[zipfile.ZipInfo], offsets: list[int], end: int) -> str:
    """end: offset of the directory."""
    last = 0
    for offset, record in sorted(zip(offsets, records), key=lambda pair: pair[0]):
        if record.header_offset < last:
            return f"its record {record.filename} overlaps another one"
        last = offset + record.compress_size
        if last > end:
            return f"its record {record.filename} claims {record.compress_size} bytes, more than the file has"
    return ""


def _size_problem(records: list[zipfile.ZipInfo], max_pickle_bytes: int, max_inflated_bytes: int) -> str:
    storages = sum(_record_key(record).startswith("data/") for record in records)
    for record in records:
        key = _record_key(record)
        is_pickle = key == "data.pkl"
        limit = max_pickle_bytes + storages * _MAX_PICKLE_BYTES_PER_STORAGE if is_pickle else _MAX_METADATA_BYTES
        if record.file_size > limit and not key.startswith("data/"):
            return f"its record {record.filename} claims {record.file_size} bytes, more than the limit of {limit}"
    compressed = list(filter(_is_compressed, records))
    packed = sum(record.compress_size for record in compressed)
    inflated = sum(record.file_size for record in compressed)
    if inflated > max(max_inflated_bytes, _MAX_INFLATION * packed):
        return f"its {packed} compressed bytes would inflate to {inflated}"
    return ""
