"""Records from formats that are not read line by line, as streams."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import IO

from fm9g.data.prepare import record_size
from fm9g.data.prepare.arrow_readers import read_parquet, read_saved_dataset
from fm9g.data.prepare.json_reader import read_json
from fm9g.data.prepare.record_size import bounded_lines, check_record_size
from fm9g.data.prepare.sources import DataSource
from fm9g.data.prepare.values import NUL_FOUND, BadRecord, LocatedRecord
from fm9g.errors import UserError

_WHOLE_FILE = "the whole file"


def read_records(source: DataSource) -> Iterator[LocatedRecord]:
    """Yields the records of a source that is not read line by line, each with its location ("row 7").

    A bad record is yielded as a BadRecord. Raises UserError if the rest cannot be read.
    """
    if source.format == "parquet":
        yield from read_parquet(source)
    elif source.format == "datasets":
        yield from read_saved_dataset(source)
    else:
        readers = {"json": read_json, "csv": _read_csv, "tsv": _read_csv, "txt": _read_text, "md": _read_text}
        with source.open() as stream:
            yield from readers[source.format](source, stream)


def _read_text(source: DataSource, stream: IO[bytes]) -> Iterator[LocatedRecord]:
    """Yields the paragraphs, which are separated by blank lines, or the complete file."""
    is_whole_file = source.text_unit == "file"
    paragraph: list[str] = []
    first_line = size = 0  # number of the paragraph's first line, and its characters
    try:
        for number, line in enumerate(bounded_lines(io.TextIOWrapper(stream, "utf-8-sig"), source), 1):
            if is_whole_file or line.strip():
                if not paragraph:
                    first_line, size = number, 0
                size += len(line)
                check_record_size(size, source)
                paragraph.append(line)
            elif paragraph:
                yield f"line {first_line}", _text_record(paragraph)
                paragraph = []
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason}); convert it, with iconv for example"
        if not is_whole_file:
            raise UserError(f"{source}: {problem}") from None
        yield _WHOLE_FILE, BadRecord(problem)
        return
    if any(line.strip() for line in paragraph):
        yield _WHOLE_FILE if is_whole_file else f"line {first_line}", _text_record(paragraph)


def _text_record(lines: list[str]) -> dict[str, str] | BadRecord:
    text = "".join(lines).strip()
    return BadRecord(NUL_FOUND, text) if "\0" in text else {"input": "", "output": text}


def _read_csv(source: DataSource, stream: IO[bytes]) -> Iterator[LocatedRecord]:
    csv.field_size_limit(record_size.MAX_RECORD_BYTES)
    size = 0  # characters of the current record

    def lines() -> Iterator[str]:
        nonlocal size
        for line in bounded_lines(io.TextIOWrapper(stream, "utf-8-sig", newline=""), source):
            size += len(line)
            check_record_size(size, source)
            yield line

    reader = csv.reader(lines(), delimiter="\t" if source.format == "tsv" else ",", strict=True)
    columns: list[str] = []
    try:
        for row in reader:
            size = 0
            where = f"line {reader.line_num}"
            if not row:
                continue
            if columns:
                yield where, _csv_record(columns, row)
            elif len(set(row)) < len(row) or "" in row:
                raise UserError(f"{source}, {where}: the first line must name each column once; found {row}")
            else:
                columns = row
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num + 1}: not {source.format}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source}, after line {reader.line_num}: not UTF-8 ({error.reason})") from None


def _csv_record(columns: list[str], row: list[str]) -> dict[str, str] | BadRecord:
    if len(row) != len(columns):
        return BadRecord(f"{len(row)} columns, but the first line names {len(columns)}", str(row))
    if any("\0" in value for value in row):
        return BadRecord(NUL_FOUND, str(row))
    return dict(zip(columns, row))
