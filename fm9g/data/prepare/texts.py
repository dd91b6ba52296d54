"""The texts of records, for the training of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fm9g.data.prepare.column_mapping import ColumnMapping
from fm9g.data.prepare.index_builder import BadRecordError, rejection_message
from fm9g.data.prepare.index_tasks import convert_source
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.records import parse_object
from fm9g.data.prepare.sources import DataSource

_NON_TEXT_KEYS = ("role", "type", "id", "tool_call_id")


def iter_texts(
    sources: Iterable[DataSource], limit: int | None = None, columns: ColumnMapping | None = None
) -> Iterator[str]:
    """Yields the texts of all records, without role names and ids.

    Args:
        limit: bytes of records to read from each source, about.
        columns: which of the user's keys holds what; None: recognized by their names.

    Raises UserError for a bad record.
    """
    for source in sources:
        num_bytes = 0
        for result in convert_source(source, IndexConfig("en", columns)):
            for rejected in result.rejected:
                raise BadRecordError(rejection_message(source, rejected))
            for chunk in result.outputs[0].chunks:
                data = chunk if isinstance(chunk, bytes) else _read_range(source.path, *chunk)
                for line in data.removesuffix(b"\n").split(b"\n"):
                    yield from _iter_strings(parse_object(line))
                num_bytes += len(data)
            if limit is not None and num_bytes >= limit:
                break


def _read_range(path: str, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def _iter_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NON_TEXT_KEYS:
                yield from _iter_strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_strings(item)
