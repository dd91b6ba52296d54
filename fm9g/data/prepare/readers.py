"""Records from what is not read by lines: arrays of JSON, csv, parquet, saved datasets, whole texts; as streams."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from fm9g.data.prepare.records import not_an_object, reject_duplicate_keys
from fm9g.data.prepare.sources import (
    CHUNK_BYTES,
    MAX_RECORD_BYTES,
    DataSource,
    bounded_lines,
    check_record_size,
    open_decompressed,
)
from fm9g.data.prepare.values import TOO_DEEP, BadRecord, parse_integer
from fm9g.errors import UserError

_BATCH_ROWS, _BATCH_BYTES = 64, 32 << 20  # rows of a parquet file, and bytes of them, that are read at a time, about
NUL_FOUND = "holds a NUL byte; is this text, and in UTF-8?"
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
# A string of JSON, maybe cut off, or what opens or closes an object or list.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)

LocatedRecord = tuple[str, "dict[str, Any] | BadRecord"]


def read_records(source: DataSource) -> Iterator[LocatedRecord]:
    """The records of a source that is not read by lines, each with where it is ("row 7").

    A record that is wrong is given as what is wrong with it. Raises UserError where reading cannot go on.
    """
    readers = {
        "json": _json_records,
        "csv": _csv_records,
        "tsv": _csv_records,
        "txt": _text_records,
        "md": _text_records,
    }
    if source.format == "parquet":
        yield from _parquet_records(source)
    elif source.format == "datasets":
        yield from _datasets_records(source)
    else:
        with open_decompressed(source) as stream:
            yield from readers[source.format](source, stream)


def _text_records(source: DataSource, stream: IO[bytes]) -> Iterator[LocatedRecord]:
    """Paragraphs, which blank lines part, or the whole file."""
    paragraph: list[str] = []
    first = size = 0

    def make_record() -> LocatedRecord:
        text = "".join(paragraph).strip()
        where = "the whole file" if whole else f"line {first}"
        return where, _bad_record(NUL_FOUND, text) if "\0" in text else {"input": "", "output": text}

    whole = source.text_unit == "file"
    try:
        for number, line in enumerate(bounded_lines(io.TextIOWrapper(stream, "utf-8-sig"), source), 1):
            if whole or line.strip():
                first = first if paragraph else number
                size = size + len(line) if paragraph else len(line)
                check_record_size(size, source)
                paragraph.append(line)
            elif paragraph:
                yield make_record()
                paragraph.clear()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason}); convert it, with iconv for example"
        if not whole:
            raise UserError(f"{source}: {problem}") from None
        yield "the whole file", BadRecord(problem)
        return
    if any(line.strip() for line in paragraph):
        yield make_record()


def _csv_records(source: DataSource, stream: IO[bytes]) -> Iterator[LocatedRecord]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    size = 0  # characters of the record that is read

    def lines() -> Iterator[str]:
        nonlocal size
        for line in bounded_lines(text, source):
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
            if not columns:
                columns = row
                if len(set(columns)) < len(columns) or "" in columns:
                    raise UserError(f"{source}, {where}: the first line names each column once; found {columns}")
            elif len(row) != len(columns):
                problem = f"{len(row)} columns, expected {len(columns)} as the first line names"
                yield where, _bad_record(problem, str(row))
            elif any("\0" in value for value in row):
                yield where, _bad_record(NUL_FOUND, str(row))
            else:
                yield where, dict(zip(columns, row))
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num + 1}: not {source.format}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source}, after line {reader.line_num}: not UTF-8 ({error.reason})") from None


def _bad_record(problem: str, content: str) -> BadRecord:
    error = BadRecord(problem)
    error.content = content
    return error


def _json_decoder(problems: list[str]) -> json.JSONDecoder:
    """Puts into `problems` what is wrong with a record that can be read on after."""

    def collect_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return reject_duplicate_keys(pairs)
        except BadRecord as error:
            problems.append(str(error))
            return dict(pairs)

    def integer(text: str) -> int:
        try:
            return parse_integer(text)
        except ValueError as error:
            problems.append(str(error))
            return 0

    return json.JSONDecoder(
        object_pairs_hook=collect_pairs,
        parse_int=integer,
        parse_constant=lambda name: problems.append(f"not JSON: {name} is no number"),
    )


def _find_value_end(buffer: str, start: int) -> int | None:
    """Where the object or list that begins at `start` ends; None where the buffer does not hold its end."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(buffer, start):
        character = buffer[found.start()]
        depth += (character in "[{") - (character in "]}")
        if depth == 0:
            return found.end()
    return None


def _json_records(source: DataSource, stream: IO[bytes]) -> Iterator[LocatedRecord]:
    """The elements of an array, or objects one after the other, however they are laid out."""
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    problems: list[str] = []  # what the decoder finds in a record that json.loads would let pass
    decoder = _json_decoder(problems)
    buffer, start, line, number, in_array, ended = "", 0, 1, 0, False, False

    def fill() -> bool:
        """Reads on; False at the end of the file."""
        nonlocal buffer, start, line
        line += buffer.count("\n", 0, start)
        buffer, start = buffer[start:], 0
        check_record_size(len(buffer), source)
        chunk = text.read(max(CHUNK_BYTES, len(buffer)))
        buffer += chunk
        return bool(chunk)

    def next_character() -> str:
        nonlocal start
        while True:
            found = _NOT_BLANK.search(buffer, start)
            start = found.start() if found else len(buffer)
            if found or not fill():
                return buffer[start : start + 1]

    try:
        if next_character() == "[":
            in_array, start = True, start + 1
        while character := next_character():
            if in_array and (ended or character == "]"):
                if ended:
                    raise ValueError(f"found {character!r} after the end of the array")
                ended, start = True, start + 1
                continue
            if in_array and number:
                if character != ",":
                    raise ValueError(f"found {character!r} between two records, expected a comma")
                start += 1
                next_character()
            while True:
                problems.clear()
                try:
                    value, end = decoder.raw_decode(buffer, start)
                    break
                except json.JSONDecodeError as error:
                    cut_off = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated string")
                    if not (cut_off and fill()):
                        raise
                except RecursionError:
                    problems[:], value, after = [TOO_DEEP], {}, _find_value_end(buffer, start)
                    if after is not None:
                        end = after
                        break
                    if not fill():
                        raise ValueError("it breaks off") from None
            number += 1
            if not isinstance(value, dict):
                problems.append(not_an_object(value))
            where = f"record {number} (line {line + buffer.count(chr(10), 0, start)})"
            yield where, _bad_record(problems[0], buffer[start:end]) if problems else value
            start = end
        if in_array and not ended:
            raise ValueError("the array is not closed; the file was cut off")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 after record {number} ({error.reason})") from None
    except ValueError as error:
        offset = start + (error.pos - start if isinstance(error, json.JSONDecodeError) else 0)
        at = line + buffer.count("\n", 0, offset)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{source}, line {at}, record {number + 1}: not JSON: {reason}") from None


def _drop_nulls_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the keys of its objects that hold null: Arrow gives all objects of a column the same keys."""
    return {column: _drop_nulls(value) for column, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_drop_nulls, value)) if isinstance(value, list) else value


def _parquet_records(source: DataSource) -> Iterator[LocatedRecord]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            names, number = file.schema_arrow.names, 0
            if len(set(names)) < len(names):
                raise UserError(f"{source}: a column is named twice; found {names}")
            for batch in file.iter_batches(batch_size=_rows_per_batch(file.metadata)):
                if batch.nbytes > MAX_RECORD_BYTES:
                    for row in range(len(batch)):
                        check_record_size(batch.slice(row, 1).nbytes, source)
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _drop_nulls_of_row(row)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow's own, and what Python raises for values that it cannot hold
        raise UserError(f"{source}: not a parquet file that can be read: {error}") from None


def _rows_per_batch(metadata: Any) -> int:
    """So many that they take little memory where rows are about as long as those of their group."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))


def _datasets_records(source: DataSource) -> Iterator[LocatedRecord]:
    import datasets

    try:
        rows = datasets.load_from_disk(source.path).with_format(None)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _drop_nulls_of_row(row)
    except MemoryError:
        raise
    except Exception as error:  # datasets raises what pyarrow, fsspec and json do
        raise UserError(f"{source}: not a folder that datasets.load_from_disk reads: {error}") from None
