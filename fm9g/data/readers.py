"""Records from what is not read by lines: arrays of JSON, csv, parquet, saved datasets, whole texts; as streams."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from fm9g.data.records import not_an_object, once
from fm9g.data.sources import CHUNK, MAX_RECORD, Source, bounded_lines, check_record_size, opened
from fm9g.data.values import TOO_DEEP, BadRecord, read_integer
from fm9g.errors import UserError

_ROWS, _BATCH = 64, 32 << 20  # rows of a parquet file, and bytes of them, that are read at a time, about
NUL = "holds a NUL byte; is this text, and in UTF-8?"
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
# A string of JSON, maybe cut off, or what opens or closes an object or list.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{}]', re.DOTALL)

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
        where = "the whole file" if whole else f"line {first}"
        return where, _bad(NUL, text) if "\0" in text else {"input": "", "output": text}

    whole = source.text_unit == "file"
    try:
        for number, line in enumerate(bounded_lines(io.TextIOWrapper(stream, "utf-8-sig"), source), 1):
            if whole or line.strip():
                first = first if paragraph else number
                size = size + len(line) if paragraph else len(line)
                check_record_size(size, source)
                paragraph.append(line)
            elif paragraph:
                yield record()
                paragraph.clear()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason}); convert it, with iconv for example"
        if not whole:
            raise UserError(f"{source}: {problem}") from None
        yield "the whole file", BadRecord(problem)
        return
    if any(line.strip() for line in paragraph):
        yield record()


def _csv_records(source: Source, stream: IO[bytes]) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD)
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
                yield where, _bad(problem, str(row))
            elif any("\0" in value for value in row):
                yield where, _bad(NUL, str(row))
            else:
                yield where, dict(zip(columns, row))
    except csv.Error as error:
        raise UserError(f"{source}, line {reader.line_num + 1}: not {source.format}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source}, after line {reader.line_num}: not UTF-8 ({error.reason})") from None


def _bad(problem: str, content: str) -> BadRecord:
    error = BadRecord(problem)
    error.content = content
    return error


def _json_decoder(wrong: list[str]) -> json.JSONDecoder:
    """Puts into `wrong` what is wrong with a record that can be read on after."""

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return once(pairs)
        except BadRecord as error:
            wrong.append(str(error))
            return dict(pairs)

    def integer(text: str) -> int:
        try:
            return read_integer(text)
        except ValueError as error:
            wrong.append(str(error))
            return 0

    return json.JSONDecoder(
        object_pairs_hook=pairs_once,
        parse_int=integer,
        parse_constant=lambda name: wrong.append(f"not JSON: {name} is no number"),
    )


def _end_of_value(buffer: str, start: int) -> int | None:
    """Where the object or list that begins at `start` ends; None where the buffer does not hold its end."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(buffer, start):
        sign = buffer[found.start()]
        depth += (sign in "[{") - (sign in "]}")
        if depth == 0:
            return found.end()
    return None


def _json_records(source: Source, stream: IO[bytes]) -> Iterator[Record]:
    """The elements of an array, or objects one after the other, however they are laid out."""
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    wrong: list[str] = []  # what the decoder finds in a record that json.loads would let pass
    decoder = _json_decoder(wrong)
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
                except RecursionError:
                    wrong[:], value, after = [TOO_DEEP], {}, _end_of_value(buffer, start)
                    if after is not None:
                        end = after
                        break
                    if not fill():
                        raise ValueError("it breaks off") from None
            number += 1
            if not isinstance(value, dict):
                wrong.append(not_an_object(value))
            where = f"record {number} (line {line + buffer.count(chr(10), 0, start)})"
            yield where, _bad(wrong[0], buffer[start:end]) if wrong else value
            start = end
        if in_array and not ended:
            raise ValueError("the array is not closed; the file was cut off")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 after record {number} ({error.reason})") from None
    except ValueError as error:
        place = start + (error.pos - start if isinstance(error, json.JSONDecodeError) else 0)
        at = line + buffer.count("\n", 0, place)
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{source}, line {at}, record {number + 1}: not JSON: {reason}") from None


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the keys of its objects that hold null: Arrow gives all objects of a column the same keys."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _parquet_records(source: Source) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            names, number = file.schema_arrow.names, 0
            if len(set(names)) < len(names):
                raise UserError(f"{source}: a column is named twice; found {names}")
            for batch in file.iter_batches(batch_size=_rows_at_a_time(file.metadata)):
                if batch.nbytes > MAX_RECORD:
                    for row in range(len(batch)):
                        check_record_size(batch.slice(row, 1).nbytes, source)
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _as_written(row)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pyarrow's own, and what Python raises for values that it cannot hold
        raise UserError(f"{source}: not a parquet file that can be read: {error}") from None


def _rows_at_a_time(metadata: Any) -> int:
    """So many that they take little memory where rows are about as long as those of their group."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_ROWS, _BATCH // max(1, longest)))


def _datasets_records(source: Source) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_from_disk(source.path).with_format(None)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _as_written(row)
    except MemoryError:
        raise
    except Exception as error:  # datasets raises what pyarrow, fsspec and json do
        raise UserError(f"{source}: not a folder that datasets.load_from_disk reads: {error}") from None
