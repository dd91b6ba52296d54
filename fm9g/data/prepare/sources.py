"""Finds the files that hold a user's records: paths, folders, globs, stdin; and recognizes their formats."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fm9g.data.dataset_files import DATA_FILE, META_FILE, REJECTS_FILE, SPLITS
from fm9g.data.prepare.decompress import CHUNK_BYTES, COMPRESSIONS, STDIN, open_decompressed
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular
from fm9g.path_kind import DATA, DATASET, DATASET_PART, TOKENIZER, check_kind, kind_of

FORMATS = ("jsonl", "json", "txt", "md", "csv", "tsv", "parquet", "datasets")
TEXT_UNITS = ("line", "paragraph", "file")

_FORMAT_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".text": "txt",
    ".md": "md",
    ".markdown": "md",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# Files that often lie beside data and hold no records.
_NON_DATA_FILES = {
    "readme.md",
    "license.md",
    "license.txt",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
}


@dataclass(frozen=True)
class DataSource:
    """A file or pipe to read, or a folder of `datasets.save_to_disk`.

    Args:
        path: "-" is stdin.
        format: one of FORMATS.
        compression: one of COMPRESSIONS, or empty.
        text_unit: one of TEXT_UNITS: which part of a text is a record.
    """

    path: str
    format: str
    compression: str = ""
    text_unit: str = "line"

    @property
    def is_lines(self) -> bool:
        """Whether each line is a record of its own, so that parts of the file can be read independently."""
        return self.format == "jsonl" or (self.format == "txt" and self.text_unit == "line")

    @property
    def is_file(self) -> bool:
        """Whether it can be read twice: neither stdin nor a pipe."""
        return self.path != STDIN and os.path.isfile(self.path)

    @property
    def is_seekable(self) -> bool:
        return self.is_file and not self.compression

    @property
    def size(self) -> int:
        """Bytes on disk, compressed if the file is; 0 if not known."""
        return os.path.getsize(self.path) if self.is_file else 0

    def open(self) -> AbstractContextManager[IO[bytes]]:
        """The decompressed bytes; see `open_decompressed`."""
        return open_decompressed(self.path, self.compression)

    def register(self) -> None:
        """Protects it from being overwritten; see fm9g.io.inputs."""
        if self.path != STDIN:
            register_input(self.path)

    def __str__(self) -> str:
        return "stdin" if self.path == STDIN else self.path


def find_sources(
    paths: list[str], format: str = "", text_unit: str = "", output: Path | None = None
) -> list[DataSource]:
    """Finds the files that paths, folders and globs name, in their order, each file once.

    The other files of an indexed dataset, such as its meta.json, are left out unless `paths` name them.

    Args:
        paths: "-" is stdin.
        format: of all files; empty: recognized by their names.
        text_unit: a record of text; empty: a line of .txt, the complete .md file.
        output: the folder that the records will go to.

    Raises UserError for a missing or empty path, for an unknown format, and for an output inside a folder that is
    read, since the next call would read it as data.
    """
    for path in paths:
        if not path:
            raise UserError("a path is empty")
        read = path.partition("**")[0] if glob.has_magic(path) and "**" in path else path
        if output is not None and _real_path(str(output)).is_relative_to(_real_path(read)):
            raise UserError(f"{output}: lies in {path}, which is read; choose a folder elsewhere")
    sources: dict[Any, DataSource] = {}  # by real path: a file that is named twice is read once
    for path in paths:
        if path != STDIN:
            check_kind(Path(path), DATA, DATASET, also=TOKENIZER)
        for source in _sources_at(path, format, text_unit):
            source.register()
            if source.path in paths or not _is_companion(Path(source.path)):
                sources.setdefault(source.path if source.path == STDIN else _real_path(source.path), source)
    return list(sources.values())


def _real_path(path: str) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() fails on a loop of links


def _is_companion(path: Path) -> bool:
    """Whether a file belongs to an indexed dataset, whose records are all in its data.jsonl."""
    folders = [path.parent, *(path.parent / name for name in SPLITS)] if path.name == REJECTS_FILE else [path.parent]
    return path.name in (META_FILE, REJECTS_FILE) and any(map(_is_indexed_dataset, folders))


def _is_indexed_dataset(folder: Path) -> bool:
    """Also true if the index or the meta.json was lost."""
    has_meta = (folder / DATA_FILE).is_file() and kind_of(folder / META_FILE) == DATASET_PART
    return has_meta or kind_of(folder) == DATASET


def _sources_at(path: str, format: str, text_unit: str) -> Iterator[DataSource]:
    if path == STDIN:
        yield _make_source(STDIN, format or "jsonl", "", text_unit)
    elif os.path.isdir(path):
        yield from _sources_in_folder(path, format, text_unit)
    elif os.path.exists(path):
        yield _source_at(path, format, text_unit)
    elif glob.has_magic(path):
        names = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
        if not names:
            raise UserError(f"{path}: matches no file")
        for name in names:
            check_regular(name)  # reading a pipe would wait for a writer; only a pipe named by itself is meant
            yield _source_at(name, format, text_unit)
    else:
        raise UserError(f"{path}: no such file")


def _sources_in_folder(path: str, format: str, text_unit: str) -> Iterator[DataSource]:
    if format == "datasets" or os.path.isfile(os.path.join(path, "state.json")):
        yield DataSource(path, "datasets")
        return
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        splits = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        raise UserError(f"{path}: holds several splits; name one of them: {', '.join(splits)}")
    names = sorted(_walk_files(path, format))
    if not names:
        raise UserError(f"{path}: no file in this folder has a known format ({', '.join(_FORMAT_BY_SUFFIX)})")
    for name in names:
        check_regular(name)
        yield _source_at(name, format, text_unit)


def _walk_files(path: str, format: str) -> Iterator[str]:
    """Yields the data files below a folder, recognized by name, without hidden ones. Links are followed."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := _real_path(folder)) in seen:  # a link back to a parent
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            is_data = not name.startswith(".") and name.lower() not in _NON_DATA_FILES
            if is_data and (format or _format_of_name(name)[0]):
                yield os.path.join(folder, name)


def _format_of_name(name: str) -> tuple[str, str]:
    """Format and compression by a file's suffixes; empty if unknown."""
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix if suffix in COMPRESSIONS else ""
    return _FORMAT_BY_SUFFIX.get(os.path.splitext(stem)[1] if compression else suffix, ""), compression


def data_stem(path: str) -> str:
    """The name of a data file without the suffixes of its format and compression."""
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in COMPRESSIONS:
        name = stem
        stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in _FORMAT_BY_SUFFIX else name


def _source_at(path: str, format: str, text_unit: str) -> DataSource:
    by_name, compression = _format_of_name(path)
    if not (format or by_name or os.path.splitext(path)[1]):
        by_name = _format_of_content(path)
    if not (format or by_name):
        known = ", ".join(_FORMAT_BY_SUFFIX)
        raise UserError(f"{path}: its name has no known suffix ({known}); give its format with --format")
    return _make_source(path, format or by_name, compression, text_unit)


def _format_of_content(path: str) -> str:
    """Format of a file without a suffix, as downloads are named, by its first character; empty if unknown."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return {b"[": "json", b"{": "jsonl"}.get(start, "")


def _make_source(path: str, format: str, compression: str, text_unit: str) -> DataSource:
    if path == STDIN and format in ("parquet", "datasets"):
        raise UserError(f"{format} cannot come from stdin; name a file")
    if path != STDIN and not os.path.exists(path):
        raise UserError(f"{path}: no such file; is it a broken link?")
    if format == "parquet":
        check_regular(path)  # it is read from its end
    if compression and format in ("parquet", "datasets"):
        raise UserError(f"{path}: {format} has a compression of its own; decompress it first")
    source = DataSource(path, format, compression, text_unit or ("file" if format == "md" else "line"))
    if format == "json" and _starts_with_record(source):
        return DataSource(path, "jsonl", compression)
    return source


def _starts_with_record(source: DataSource) -> bool:
    """Whether the first line of a .json file is an object; the file is then read as .jsonl."""
    if not source.is_file:  # bytes read from a pipe cannot be read again
        return False
    with source.open() as stream:
        line = stream.readline(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
    try:
        return isinstance(json.loads(line), dict) if line.startswith(b"{") else False
    except (ValueError, RecursionError):
        return False
