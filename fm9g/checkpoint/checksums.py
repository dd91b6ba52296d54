"""The checksums that a .pt file, which is a zip archive, has of its records.

    local header | name | values | descriptor | ... | directory: an entry for each record | end

A record's CRC-32 stands in its entry of the directory, and in the descriptor behind its values or, where it has none,
in its local header (PKWARE's APPNOTE, sections 4.3 and 4.4). Files that are laid out before their values are known get
theirs last.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

_LOCAL, _ENTRY = struct.Struct("<26x2H"), struct.Struct("<28x3H12x")  # the lengths of the names and so on behind them
_DESCRIPTOR = b"PK\x07\x08"
_HAS_DESCRIPTOR = 1 << 3  # a flag of a record
_CRC_IN_LOCAL, _CRC_IN_ENTRY, _CRC_IN_DESCRIPTOR = 14, 16, 4
_BLOCK = 1 << 22  # bytes that are read at a time


def write_checksums(path: Path, sums: Mapping[int, int]) -> None:
    """Writes the CRC-32 of records into an archive that has no compressed ones. sums: where the values of a record
    begin -> their CRC-32; other records keep theirs."""
    with path.open("r+b") as file:
        with zipfile.ZipFile(file) as archive:
            records, place = archive.infolist(), archive.start_dir
        for record in records:
            file.seek(record.header_offset)
            name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
            values = record.header_offset + _LOCAL.size + name + extra
            file.seek(place)
            entry = place
            place += _ENTRY.size + sum(_ENTRY.unpack(file.read(_ENTRY.size)))
            if values not in sums:
                continue
            crc = struct.pack("<I", sums[values])
            places = [entry + _CRC_IN_ENTRY]
            if record.flag_bits & _HAS_DESCRIPTOR:
                descriptor = values + record.file_size
                file.seek(descriptor)
                has_mark = file.read(4) == _DESCRIPTOR
                places.append(descriptor + _CRC_IN_DESCRIPTOR * has_mark)
            else:
                places.append(record.header_offset + _CRC_IN_LOCAL)
            for each in places:
                file.seek(each)
                file.write(crc)


def checksum_of(path: Path, start: int, end: int) -> int:
    """The CRC-32 of bytes of a file."""
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(_BLOCK, end - start))
            crc, start = zlib.crc32(block, crc), start + len(block)
    return crc
