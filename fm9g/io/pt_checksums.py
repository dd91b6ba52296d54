"""The checksums of the records in a .pt file, which is a zip archive.

    local header | name | values | descriptor | ... | directory: an entry for each record | end

The CRC-32 of a record is in its directory entry, and in the descriptor after its values or, without one, in its
local header (PKWARE's APPNOTE, sections 4.3 and 4.4). Files that are laid out before their values are known get their
checksums last.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

# Each ends with the lengths of the fields of variable length that follow it.
_LOCAL_HEADER, _DIRECTORY_ENTRY = struct.Struct("<26x2H"), struct.Struct("<28x3H12x")
_DESCRIPTOR_MAGIC = b"PK\x07\x08"  # optional
_HAS_DESCRIPTOR = 1 << 3  # flag bit of a record
_CRC_IN_LOCAL, _CRC_IN_ENTRY, _CRC_IN_DESCRIPTOR = 14, 16, 4  # byte offsets
_BLOCK_BYTES = 1 << 22  # bytes read at a time


def write_checksums(path: Path, crcs: Mapping[int, int]) -> None:
    """Writes the CRC-32 of some records into an archive without compressed records.

    Args:
        path: the archive.
        crcs: CRC-32 of a record's values by their offset in the file.
    """
    with path.open("r+b") as file:
        with zipfile.ZipFile(file) as archive:
            records, offset = archive.infolist(), archive.start_dir
        for record in records:
            file.seek(record.header_offset)
            name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            values = record.header_offset + _LOCAL_HEADER.size + name + extra
            file.seek(offset)
            entry = offset
            offset += _DIRECTORY_ENTRY.size + sum(_DIRECTORY_ENTRY.unpack(file.read(_DIRECTORY_ENTRY.size)))
            if values not in crcs:
                continue
            crc = struct.pack("<I", crcs[values])
            offsets = [entry + _CRC_IN_ENTRY]
            if record.flag_bits & _HAS_DESCRIPTOR:
                descriptor = values + record.file_size
                file.seek(descriptor)
                has_magic = file.read(4) == _DESCRIPTOR_MAGIC
                offsets.append(descriptor + _CRC_IN_DESCRIPTOR * has_magic)
            else:
                offsets.append(record.header_offset + _CRC_IN_LOCAL)
            for offset_of_crc in offsets:
                file.seek(offset_of_crc)
                file.write(crc)


def crc32_of_range(path: Path, start: int, end: int) -> int:
    """The CRC-32 of bytes start to end of a file."""
    crc = 0
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(_BLOCK_BYTES, end - start))
            crc, start = zlib.crc32(block, crc), start + len(block)
    return crc
