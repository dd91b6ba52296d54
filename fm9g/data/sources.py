"""Where records come from: files of every kind that users have, folders, globs, stdin; read as streams."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fm9g.data.records import not_an_object, repeated_key
from fm9g.data.shapes import BadRecord
from fm9g.errors import UserError

FORMATS = ("jsonl", "json", "txt", "md", "csv", "tsv", "parquet", "datasets")
TEXT_UNITS = ("line", "paragraph", "file")
STDIN = "-"
MAX_RECORD = 512 << 20  # bytes; what is longer is no record, but a file of another format

_SUFFIXES = {
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
_NOT_DATA = {"readme.md", "license.md", "license.txt", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
CHUNK = 1 << 20  # bytes that are read at a time
_ROWS = 1024
_NOT_BLANK = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True)
class Source:
    """A file to read (a folder for `datasets`). compression: a suffix, or empty. text_unit: a record of text."""

    path: str
    format: str
    compression: str = ""
    text_unit: str = "line"

    @property
    def is_lines(self) -> bool:
        """Whether each line stands for itself, so that parts of the file can be read apart."""
        return self.format == "jsonl" or (self.format == "txt" and self.text_unit == "line")

    @property
    def is_seekable(self) -> bool:
        return self.path != STDIN and not self.compression

    @property
    def size(self) -> int:
        """Bytes, as far as they are known; those of a compressed file are compressed."""
        return 0 if self.path == STDIN or self.format == "datasets" else os.path.getsize(self.path)

    def __str__(self) -> str:
        return "stdin" if self.path == STDIN else self.path


def find_sources(paths: list[str], format: str = "", text_unit: str = "", output: Path | None = None) -> list[Source]:
    """The files that paths, folders and globs stand for, in order. `-` is stdin.

    format: of all of them; empty: by their names. text_unit: empty: a line of .txt, the whole of .md. output: where
    the records will go. Raises UserError for what is missing, empty or of no known format, and for an output in a
    folder that is read: the next reading would find it there.
    """
    for path in paths:
        if output is not None and output.resolve().is_relative_to(Path(path).resolve()):
            raise UserError(f"{output}: lies in {path}, which is read; choose a folder elsewhere")
    sources = [source for path in paths for source in _find(path, format, text_unit)]
    if sum(source.path == STDIN for source in sources) > 1:
        raise UserError("stdin (-) is given twice")
    return sources


def _find(path: str, format: str, text_unit: str) -> Iterator[Source]:
    if path == STDIN:
        yield _source(STDIN, format or "jsonl", "", text_unit)
    elif os.path.isdir(path):
        if format == "datasets" or os.path.isfile(os.path.join(path, "state.json")):
            yield Source(path, "datasets")
            return
        if os.path.isfile(os.path.join(path, "dataset_dict.json")):
            splits = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
            raise UserError(f"{path}: holds several splits; name one of them: {', '.join(splits)}")
        found = sorted(
            os.path.join(folder, name)
            for folder, folders, names in os.walk(path)
            for name in names
            if not name.startswith(".") and name.lower() not in _NOT_DATA and (format or _by_name(name)[0])
        )
        if not found:
            raise UserError(f"{path}: no file in this folder has a format that is read ({', '.join(_SUFFIXES)})")
        for name in found:
            yield _by_path(name, format, text_unit)
    elif os.path.exists(path):
        yield _by_path(path, format, text_unit)
    elif glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not found:
            raise UserError(f"{path}: matches no file")
        for name in found:
            yield _by_path(name, format, text_unit)
    else:
        raise UserError(f"{path}: no such file")


def _by_name(name: str) -> tuple[str, str]:
    """Format and compression that a file's name tells; empty where it tells none."""
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    return _SUFFIXES.get(os.path.splitext(stem)[1] if compression else suffix, ""), compression


def _by_path(path: str, format: str, text_unit: str) -> Source:
    by_name, compression = _by_name(path)
    if not (format or by_name):
        known = ", ".join(_SUFFIXES)
        raise UserError(f"{path}: its name tells no format that is read ({known}); say which with --format")
    return _source(path, format or by_name, compression, text_unit)


def _source(path: str, format: str, compression: str, text_unit: str) -> Source:
    if compression and format in ("parquet", "datasets"):
        raise UserError(f"{path}: {format} has a compression of its own; decompress it first")
    source = Source(path, format, compression, text_unit or ("file" if format == "md" else "line"))
    if format == "json" and _starts_with_a_record(source):
        return Source(path, "jsonl", compression)
    return source


def _starts_with_a_record(source: Source) -> bool:
    """Whether a .json file has an object on its first line: then it is read as .jsonl."""
    if source.path == STDIN:
        return False
    with opened(source) as stream:
        line = stream.readline(CHUNK).removeprefix(b"\xef\xbb\xbf").strip()
    try:
        return isinstance(json.loads(line), dict) if line.startswith(b"{") else False
    except ValueError:
        return False


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a source. Raises UserError for what cannot be opened or decompressed."""
    try:
        if source.path == STDIN:
            yield sys.stdin.buffer
            return
        with open(source.path, "rb") as file, _decompressed(file, source.compression) as stream:
            yield stream
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{source}: cannot be read: {error.strerror}") from None
        raise UserError(f"{source}: cannot be decompressed, is it whole? {error}") from None


def _decompressed(file: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".bz2":
        return bz2.BZ2File(file)
    if compression == ".zst":
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd", buffer_size=CHUNK)
    return nullcontext(file)


def line_blocks(source: Source) -> Iterator[bytes]:
    """The bytes of a source in blocks of whole lines. Raises UserError for a line that never ends."""
    with opened(source) as stream:
        rest = b""
        while chunk := stream.read(max(CHUNK, len(rest))):
            whole, newline, tail = chunk.rpartition(b"\n")
            if newline:
                yield rest + whole + newline
                rest = tail
            else:
                rest += chunk
                check_record_size(len(rest), source)
        if rest:
            yield rest


def check_record_size(size: int, source: Any) -> None:
    if size > MAX_RECORD:
        raise UserError(
            f"{source}: a record is longer than {MAX_RECORD >> 20} MB; is this the right format? (--format)"
        )


Record = tuple[str, "dict[str, Any] | BadRecord"]


def records(source: Source) -> Iterator[Record]:
    """The records of a source that is not read by lines, each with where it is ("row 7").

    A record that is wrong is given as what is wrong with it. Raises UserError where reading cannot go on.
    """
    kinds = {"json": _json_records, "csv": _csv_records, "tsv": _csv_records, "txt": _texts, "md": _texts}
    if source.format == "parquet":
        yield from _parquet_records(source)
    elif source.format == "datasets":
        yield from _datasets_records(source)
    else:
        with opened(source) as stream:
            yield from kinds[source.format](source, stream)


def _texts(source: Source, stream: IO[bytes]) -> Iterator[Record]:
    """Paragraphs, which blank lines part, or the whole file."""
    paragraph: list[str] = []
    first = size = 0

    def record() -> Record:
        text = "".join(paragraph).strip()
        where = "the whole file" if source.text_unit == "file" else f"line {first}"
        return where, {"input": "", "output": text}

    for number, line in enumerate(_decoded(source, stream), 1):
        if line.strip() or source.text_unit == "file":
            first = first if paragraph else number
            size = size + len(line) if paragraph else len(line)
            check_record_size(size, source)
            paragraph.append(line)
        elif paragraph:
            yield record()
            paragraph.clear()
    if any(line.strip() for line in paragraph):
        yield record()


def _decoded(source: Source, stream: IO[bytes]) -> Iterator[str]:
    """The lines of UTF-8 text, all with \\n at their end."""
    try:
        yield from io.TextIOWrapper(stream, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 ({error.reason}); convert it, with iconv for example") from None


def _csv_records(source: Source, stream: IO[bytes]) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    reader = csv.DictReader(text, delimiter="\t" if source.format == "tsv" else ",", strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if len(set(columns)) < len(columns) or "" in columns:
            raise UserError(f"{source}, line 1: its first line has to name each column once; found {columns}")
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None, ()))
                yield where, BadRecord(f"{found} columns, expected {len(columns)} as the first line names")
            else:
                yield where, row
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num}: not {source.format}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source}, after line {reader.line_num}: not UTF-8 ({error.reason})") from None


def _json_records(source: Source, stream: IO[bytes]) -> Iterator[Record]:
    """The elements of an array, or objects one after the other, however they are laid out."""
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    wrong: list[str] = []  # what the decoder below finds in a record that json.loads would let pass

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            wrong.append(repeated_key([key for key, _ in pairs]))
        return content

    decoder = json.JSONDecoder(
        object_pairs_hook=once, parse_constant=lambda name: wrong.append(f"not JSON: {name} is no number")
    )
    buffer, start, line, number, in_array, ended = "", 0, 1, 0, False, False

    def fill() -> bool:
        """Reads on; False at the end of the file."""
        nonlocal buffer, start, line
        line += buffer.count("\n", 0, start)
        buffer, start = buffer[start:], 0
        check_record_size(len(buffer), source)
        chunk = text.read(max(CHUNK, len(buffer)))
        buffer += chunk
        return bool(chunk)

    def next_sign() -> str:
        nonlocal start
        while True:
            found = _NOT_BLANK.search(buffer, start)
            start = found.start() if found else len(buffer)
            if found or not fill():
                return buffer[start : start + 1]

    try:
        if next_sign() == "[":
            in_array, start = True, start + 1
        while sign := next_sign():
            if in_array and (ended or sign == "]"):
                if ended:
                    raise ValueError(f"found {sign!r} after the end of the array")
                ended, start = True, start + 1
                continue
            if in_array and number:
                if sign != ",":
                    raise ValueError(f"found {sign!r} between two records, expected a comma")
                start += 1
                next_sign()
            while True:
                wrong.clear()
                try:
                    value, end = decoder.raw_decode(buffer, start)
                    break
                except json.JSONDecodeError as error:
                    cut_off = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated string")
                    if not (cut_off and fill()):
                        raise
            number += 1
            if not isinstance(value, dict):
                wrong.append(not_an_object(value))
            where = f"record {number} (line {line + buffer.count(chr(10), 0, start)})"
            yield where, BadRecord(wrong[0]) if wrong else value
            start = end
        if in_array and not ended:
            raise ValueError("the array is not closed; the file was cut off")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 after record {number} ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        place = start + (error.pos - start if isinstance(error, json.JSONDecodeError) else 0)
        at = line + buffer.count("\n", 0, place)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{source}, line {at}, record {number + 1}: not JSON: {reason}") from None


def _parquet_records(source: Source) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a parquet file that can be read: {error}") from None


def _datasets_records(source: Source) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_from_disk(source.path).with_format(None)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except Exception as error:  # datasets raises what pyarrow, fsspec and json do
        raise UserError(f"{source}: not a folder that datasets.load_from_disk reads: {error}") from None
