"""Where records come from: files of every kind that users have, folders, globs, stdin, compressed or not."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.path_kind import DATA, DATASET, TOKENIZER, check_kind
from fm9g.io.regular_file import check_regular

FORMATS = ("jsonl", "json", "txt", "md", "csv", "tsv", "parquet", "datasets")
TEXT_UNITS = ("line", "paragraph", "file")
STDIN = "-"
MAX_RECORD_BYTES = 128 << 20  # bytes; what is longer is no record, but a file of another format

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
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
# What lies beside data and is none.
_NON_DATA_FILES = {
    "readme.md",
    "license.md",
    "license.txt",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
}
CHUNK_BYTES = 1 << 20  # bytes that are read at a time
_XZ_MEMORY_LIMIT = 256 << 20  # bytes; `xz -9` needs 65 MB to be read, and a file may ask for 4 GB


@dataclass(frozen=True)
class DataSource:
    """A file or pipe to read; a folder for `datasets`. compression: a suffix, or empty. text_unit: a record of text."""

    path: str
    format: str
    compression: str = ""
    text_unit: str = "line"

    @property
    def is_lines(self) -> bool:
        """Whether each line stands for itself, so that parts of the file can be read apart."""
        return self.format == "jsonl" or (self.format == "txt" and self.text_unit == "line")

    @property
    def is_file(self) -> bool:
        """Whether it can be read again: not stdin, nor a pipe."""
        return self.path != STDIN and os.path.isfile(self.path)

    @property
    def is_seekable(self) -> bool:
        return self.is_file and not self.compression

    @property
    def size(self) -> int:
        """Bytes, as far as they are known; those of a compressed file are compressed."""
        return os.path.getsize(self.path) if self.is_file else 0

    def note(self) -> None:
        """Says that it is read: see fm9g.io.inputs."""
        if self.path != STDIN:
            register_input(self.path)

    def __str__(self) -> str:
        return "stdin" if self.path == STDIN else self.path


def find_sources(
    paths: list[str], format: str = "", text_unit: str = "", output: Path | None = None
) -> list[DataSource]:
    """The files that paths, folders and globs stand for, in order. `-` is stdin.

    format: of all of them; empty: by their names. text_unit: empty: a line of .txt, the whole of .md. output: where
    the records will go. Raises UserError for what is missing, empty or of no known format, and for an output in a
    folder that is read: the next reading would find it there.
    """
    for path in paths:
        if not path:
            raise UserError("a path is empty")
        read = path.partition("**")[0] if glob.has_magic(path) and "**" in path else path
        if output is not None and _real_path(str(output)).is_relative_to(_real_path(read)):
            raise UserError(f"{output}: lies in {path}, which is read; choose a folder elsewhere")
    sources: dict[Any, DataSource] = {}  # by what they really are: a file that is named twice is read once
    for path in paths:
        if path != STDIN:
            check_kind(Path(path), DATA, DATASET, also=TOKENIZER)
        for source in _sources_at(path, format, text_unit):
            sources.setdefault(source.path if source.path == STDIN else _real_path(source.path), source)
            source.note()
    return list(sources.values())


def _real_path(path: str) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() fails on a loop of links


def _sources_at(path: str, format: str, text_unit: str) -> Iterator[DataSource]:
    if path == STDIN:
        yield _make_source(STDIN, format or "jsonl", "", text_unit)
    elif os.path.isdir(path):
        if format == "datasets" or os.path.isfile(os.path.join(path, "state.json")):
            yield DataSource(path, "datasets")
            return
        if os.path.isfile(os.path.join(path, "dataset_dict.json")):
            splits = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
            raise UserError(f"{path}: holds several splits; name one of them: {', '.join(splits)}")
        found = sorted(_walk_files(path, format))
        if not found:
            raise UserError(
                f"{path}: no file in this folder has a format that is read ({', '.join(_FORMAT_BY_SUFFIX)})"
            )
        for name in found:
            check_regular(name)  # what was not named by itself may be no pipe, which would be waited for
            yield _source_at(name, format, text_unit)
    elif os.path.exists(path):
        yield _source_at(path, format, text_unit)
    elif glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
        if not found:
            raise UserError(f"{path}: matches no file")
        for name in found:
            check_regular(name)
            yield _source_at(name, format, text_unit)
    else:
        raise UserError(f"{path}: no such file")


def _walk_files(path: str, format: str) -> Iterator[str]:
    """The files of a folder and of those in it that hold data by their names; nothing hidden. Links are followed."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := _real_path(folder)) in seen:  # a link back to where we were
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if (
                not name.startswith(".")
                and name.lower() not in _NON_DATA_FILES
                and (format or _format_of_name(name)[0])
            ):
                yield os.path.join(folder, name)


def _format_of_name(name: str) -> tuple[str, str]:
    """Format and compression that a file's name tells; empty where it tells none."""
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    return _FORMAT_BY_SUFFIX.get(os.path.splitext(stem)[1] if compression else suffix, ""), compression


def _source_at(path: str, format: str, text_unit: str) -> DataSource:
    by_name, compression = _format_of_name(path)
    if not (format or by_name):
        known = ", ".join(_FORMAT_BY_SUFFIX)
        raise UserError(f"{path}: its name tells no format that is read ({known}); say which with --format")
    return _make_source(path, format or by_name, compression, text_unit)


def _make_source(path: str, format: str, compression: str, text_unit: str) -> DataSource:
    if path == STDIN and format in ("parquet", "datasets"):
        raise UserError(f"{format} cannot come from stdin; name a file")
    if path != STDIN and not os.path.exists(path):
        raise UserError(f"{path}: no such file; a link to nothing?")
    if format == "parquet":
        check_regular(path)  # it is read from its end
    if compression and format in ("parquet", "datasets"):
        raise UserError(f"{path}: {format} has a compression of its own; decompress it first")
    source = DataSource(path, format, compression, text_unit or ("file" if format == "md" else "line"))
    if format == "json" and _starts_with_record(source):
        return DataSource(path, "jsonl", compression)
    return source


def _starts_with_record(source: DataSource) -> bool:
    """Whether a .json file has an object on its first line: then it is read as .jsonl."""
    if not source.is_file:  # what is read of a pipe is gone
        return False
    with open_decompressed(source) as stream:
        line = stream.readline(CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").strip()
    try:
        return isinstance(json.loads(line), dict) if line.startswith(b"{") else False
    except (ValueError, RecursionError):
        return False


@contextmanager
def open_decompressed(source: DataSource) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a source. Raises UserError for what cannot be opened or decompressed."""
    try:
        if source.path == STDIN:
            yield sys.stdin.buffer
            return
        with open(source.path, "rb") as file, _decompressing(file, source.compression) as stream:
            yield stream
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{source}: cannot be read: {error.strerror}") from None
        raise UserError(f"{source}: cannot be decompressed, is it whole? {error}") from None


def _decompressing(file: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression in (".xz", ".bz2"):
        make_decompressor = _xz_decompressor if compression == ".xz" else bz2.BZ2Decompressor
        return io.BufferedReader(_ConcatReader(file, make_decompressor), CHUNK_BYTES)
    if compression == ".zst":
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd", buffer_size=CHUNK_BYTES)
    return nullcontext(file)


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY_LIMIT)


class _ConcatReader(io.RawIOBase):
    """The content of compressed streams, one after the other. Python's own readers take damage at the beginning of a
    stream for the end of the file."""

    def __init__(self, file: IO[bytes], make_decompressor: Callable[[], Any]) -> None:
        self._file, self._make_decompressor = file, make_decompressor
        self._decompressor, self._pending = make_decompressor(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                # A file of xz may be padded with zeros.
                self._pending = (self._decompressor.unused_data or self._file.read(CHUNK_BYTES)).lstrip(b"\0")
                if not self._pending:
                    return 0
                self._decompressor = self._make_decompressor()
            if self._decompressor.needs_input and not self._pending:
                self._pending = self._file.read(CHUNK_BYTES)
                if not self._pending:
                    raise EOFError("it ends in the middle")
            data = self._decompressor.decompress(self._pending, len(buffer))
            self._pending = b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def line_blocks(source: DataSource) -> Iterator[bytes]:
    """The bytes of a source in blocks of whole lines. Raises UserError for a line that never ends."""
    with open_decompressed(source) as stream:
        rest = b""
        while chunk := stream.read(max(CHUNK_BYTES, len(rest))):
            whole, newline, tail = chunk.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
                rest = tail
            else:
                rest += chunk
                check_record_size(len(rest), source)
        if rest:
            yield rest


def bounded_lines(text: IO[AnyStr], source: Any) -> Iterator[AnyStr]:
    """The lines of a stream. Raises UserError for one that never ends, before it fills the memory."""
    while line := text.readline(MAX_RECORD_BYTES + 1):
        check_record_size(len(line), source)
        yield line


def check_record_size(size: int, source: Any) -> None:
    if size > MAX_RECORD_BYTES:
        raise UserError(
            f"{source}: a record is longer than {MAX_RECORD_BYTES >> 20} MB; is this the right format? (--format)"
        )
