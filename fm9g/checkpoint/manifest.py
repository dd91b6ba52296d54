"""manifest.json: size and CRC-32 of every file of a checkpoint."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fm9g.checkpoint.layout import MANIFEST
from fm9g.errors import UserError
from fm9g.io.json_file import read_json

ProgressCallback = Callable[[int], None]  # called with a number of further bytes that are done
_BLOCK_BYTES = 1 << 18  # small enough to stay in the cache of a core


def write_manifest(folder: Path, step: int) -> None:
    """Writes the manifest of the files that are in a checkpoint's folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = {str(file.relative_to(folder)): [file.stat().st_size, checksum(file)] for file in files}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": sums}, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step, and size and checksum of every file. Raises UserError if the manifest is missing or invalid."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder}: not a checkpoint ({MANIFEST} is missing)")
    manifest = read_json(file, is_input=False)
    try:
        files = {name: (int(size), str(crc)) for name, (size, crc) in manifest["files"].items()}
        return int(manifest["step"]), files
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: not a manifest; the checkpoint is damaged") from None


def find_damaged_files(
    folder: Path, files: dict[str, tuple[int, str]], checksums: bool, on_progress: ProgressCallback | None = None
) -> Iterator[tuple[str, str]]:
    """The files that differ from the manifest, each with what is wrong. checksums: False compares only the sizes."""
    for name, (size, crc) in files.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual is None:
            yield name, "is missing"
        elif actual != size:
            yield name, f"has {actual} of {size} bytes"
        elif checksums and checksum(file, on_progress) != crc:
            yield name, "its content has changed"


def checksum(file: Path, on_progress: ProgressCallback | None = None) -> str:
    """CRC-32 of a file's content, as manifests have it."""
    value, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as content:
        while count := content.readinto(block):
            value = zlib.crc32(block[:count], value)
            if on_progress:
                on_progress(count)
    return f"{value:08x}"
