"""Records from Arrow tables: parquet files and folders of `datasets.save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fm9g.data.prepare import record_size
from fm9g.data.prepare.record_size import check_record_size
from fm9g.data.prepare.sources import DataSource
from fm9g.data.prepare.values import LocatedRecord
from fm9g.errors import UserError

_MAX_BATCH_ROWS = 64
BATCH_BYTES = 32 << 20  # approximate bytes of a parquet file in memory at a time


def read_parquet(source: DataSource) -> Iterator[LocatedRecord]:
    """Yields the rows of a parquet file, a batch in memory at a time."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path, page_checksum_verification=True) as file:
            names, number = file.schema_arrow.names, 0
            if len(set(names)) < len(names):
                raise UserError(f"{source}: two columns have the same name; found {names}")
            for batch in file.iter_batches(batch_size=rows_per_batch(file.metadata)):
                if batch.nbytes > record_size.MAX_RECORD_BYTES:
                    for row in range(len(batch)):
                        check_record_size(batch.slice(row, 1).nbytes, source)
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _drop_nulls_of_row(row)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of pyarrow, and of Python for values that it cannot hold
        raise UserError(f"{source}: not a readable parquet file: {error}") from None


def rows_per_batch(metadata: Any, batch_bytes: int = BATCH_BYTES) -> int:
    """How many rows fit into `batch_bytes`, if the rows of a row group are about equally long."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_MAX_BATCH_ROWS, batch_bytes // max(1, longest)))


def read_saved_dataset(source: DataSource) -> Iterator[LocatedRecord]:
    """Yields the rows of a folder of `datasets.save_to_disk`."""
    import datasets

    try:
        rows = datasets.load_from_disk(source.path).with_format(None)
        for number, row in enumerate(rows, 1):
            yield f"row {number}", _drop_nulls_of_row(row)
    except MemoryError:
        raise
    except Exception as error:  # datasets passes on errors of pyarrow, fsspec and json
        raise UserError(f"{source}: not a folder that datasets.load_from_disk reads: {error}") from None


def _drop_nulls_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """Drops the null keys of objects in a row: Arrow gives all objects of a column the same keys."""
    return {column: _drop_nulls(value) for column, value in row.items()}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_drop_nulls, value)) if isinstance(value, list) else value
