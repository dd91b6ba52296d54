"""Parquet files and saved datasets: nulls, damage, memory."""

import json
import random
from pathlib import Path

import pytest
from helpers.common import index_dataset, write_jsonl
from helpers.indexing import CALLS, read_dataset

from fm9g.data.prepare import record_size
from fm9g.data.prepare.arrow_readers import read_parquet, rows_per_batch
from fm9g.data.prepare.sources import DataSource
from fm9g.errors import UserError


def test_nulls_that_arrow_fills_in_are_not_read(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(CALLS)
    assert table.to_pylist() != CALLS
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    index_dataset(write_jsonl(tmp_path / "a.jsonl", CALLS), tmp_path / "lines", "en")
    as_lines = read_dataset(tmp_path / "lines")
    assert as_lines[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "P"}
    for name in ("a.parquet", "saved"):
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True)
        assert read_dataset(tmp_path / "out") == as_lines, name
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True, as_is=True)
        assert read_dataset(tmp_path / "out") == CALLS, name
    nulls = json.loads(json.dumps(CALLS).replace('"P"', "null"))
    for name in ("nulls.jsonl", "nulls.json"):
        (tmp_path / name).write_text(json.dumps(nulls[0]))
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True)
        (record,) = read_dataset(tmp_path / "out")
        assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_a_damaged_page_of_parquet_is_seen(tmp_path: Path) -> None:
    """Where the file has checksums, which its writer decides."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"input": ["a"] * 50, "output": [f"precious {i}" for i in range(50)]}),
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"precious 7", b"previous 7"))
    with pytest.raises(UserError, match=r"a\.parquet"):
        index_dataset(tmp_path / "a.parquet", tmp_path / "out", "en")


def test_records_of_parquet_are_read_few_at_a_time_where_they_are_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    # Of different letters: repeated texts would be stored once.
    texts = ["".join(random.Random(i).choices("abcdefgh", k=20_000)) for i in range(12)]
    pq.write_table(pyarrow.table({"input": [""] * 12, "output": texts}), file, use_dictionary=False, compression=None)
    assert rows_per_batch(pq.ParquetFile(file).metadata, batch_bytes=40_000) == 1
    assert len(list(read_parquet(DataSource(str(file), "parquet")))) == 12
    monkeypatch.setattr(record_size, "MAX_RECORD_BYTES", 15_000)
    with pytest.raises(UserError, match=r"a\.parquet: a record is longer than 0 MB"):
        list(read_parquet(DataSource(str(file), "parquet")))
