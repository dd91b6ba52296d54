"""Every format gives the same records, and every mistake in a file has its message."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from helpers.common import index_dataset
from helpers.indexing import FILES, JSONL, RECORDS, read_dataset

from fm9g.data.prepare import record_size
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.readers import read_records
from fm9g.data.prepare.sources import DataSource, find_sources
from fm9g.data.prepare.texts import iter_texts
from fm9g.errors import UserError


def zst(data: bytes) -> bytes:
    import pyarrow

    buffer = io.BytesIO()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
        stream.flush()
        buffer.close = lambda: None  # type: ignore[method-assign]
    return buffer.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    index_dataset(tmp_path / name, tmp_path / "out", "zh")
    assert read_dataset(tmp_path / "out") == RECORDS


def test_zst_parquet_and_a_datasets_folder_give_the_same_records(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl.zst").write_bytes(zst(JSONL))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    datasets.disable_progress_bars()
    created = datasets.Dataset.from_list(RECORDS)
    created.save_to_disk(str(tmp_path / "folder"))
    for name in ("a.jsonl.zst", "a.parquet", "folder"):
        index_dataset(tmp_path / name, tmp_path / "out", "zh", overwrite=True)
        assert read_dataset(tmp_path / "out") == RECORDS, name
    datasets.DatasetDict(train=created, test=created).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="holds several splits; name one of them: test, train"):
        find_sources([str(tmp_path / "splits")])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match=r"bad.parquet: not a readable parquet file"):
        index_dataset(tmp_path / "bad.parquet", tmp_path / "no", "zh")
    (tmp_path / "cut.jsonl.zst").write_bytes(zst(JSONL * 1000)[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl.zst"):
        index_dataset(tmp_path / "cut.jsonl.zst", tmp_path / "no", "zh")


def test_text_is_read_by_lines_paragraphs_or_files(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\n\n \nthree\n"
    for name in ("a.txt", "a.md"):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")

    def outputs(name: str, unit: str = "") -> list[str]:
        found = find_sources([str(tmp_path / name)], text_unit=unit)
        build_index(found, tmp_path / "out", IndexConfig("en"), overwrite=True)
        return [record["output"] for record in read_dataset(tmp_path / "out")]

    assert outputs("a.txt") == ["one", "two", "three"]
    assert outputs("a.txt", "paragraph") == ["one\ntwo", "three"]
    assert outputs("a.md") == ["one\ntwo\n\n \nthree"]
    assert list(iter_texts(find_sources([str(tmp_path / "a.txt")]))) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", b'{"output": "a", "output": "b"}\n', "line 1: the key 'output' is given twice"),
        ("a.jsonl", b'{"output" : "a", "input": "", "output": "b"}\n', "line 1: the key 'output' is given twice"),
        ("a.jsonl", b'{"output": NaN}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"output": "\\ud800"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"input": "", "output": "\\ud800"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"input": "", "output": "\x00"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"input": "", "output": "\xff"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"input": "", "output": "a}\n{"b"}\n', "line 1: not JSON"),
        ("a.jsonl", b'{"input": "", "output": "a"}{"input": "", "output": "b"}\n', "line 1: not JSON"),
        ("a.jsonl", b'[{"output": "a"}]\n', "found a JSON list, expected an object"),
        ("a.jsonl", b'{"question": "a"}\n', "--columns prompt=KEY,response=KEY"),
        ("a.txt", b"good\n\xff\xfe\n", "line 2: not UTF-8"),
        ("a.txt", b"a\x00b\n", "line 1: holds a NUL byte"),
        ("a.md", b"\xff", "a.md, the whole file: not UTF-8"),
        ("a.json", b'[{"output": "a"}, {"output": "b", "output": "c"}]', "record 2 .line 1.: the key 'output' is"),
        ("a.json", b'[{"output": "a"},\n{"output": NaN}]', r"record 2 \(line 2\): not JSON: NaN"),
        ("a.json", b'[{"output": "a"},\n 3]', r"record 2 \(line 2\): found a JSON int"),
        ("a.json", b'[{"output": "a"}\n{"output": "b"}]', r"line 2, record 2: not JSON: found '{' between two records"),
        ("a.json", b'[{"output": "a"}, {"out', "record 2: not JSON"),
        ("a.json", b'[{"output": "a"}', "the array is not closed"),
        ("a.json", b'[{"output": "a"}] []', "after the end of the array"),
        ("a.json", b"\xff[]", "not UTF-8"),
        ("a.json", b'[{"output": "\\ud800"}]', "record 1 .*: cannot be written as JSON"),
        ("a.csv", b"input,output\na,b\nc\n", "line 3: 1 columns, but the first line names 2"),
        ("a.csv", b"input,output\na,b,c\n", "line 2: 3 columns, but the first line names 2"),
        ("a.csv", b"input,input\na,b\n", "must name each column once"),
        ("a.csv", b'input,output\na,"b\n', "not csv"),
        ("a.csv", b"input,output\na,\xff\n", "not UTF-8"),
        ("a.csv", b"", "nothing to index"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], "cannot be decompressed; is the file complete"),
        ("a.jsonl.gz", JSONL, "cannot be decompressed; is the file complete"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-9], "cannot be decompressed; is the file complete"),
        ("a.jsonl.bz2", bz2.compress(JSONL)[:-9], "cannot be decompressed; is the file complete"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_left(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=expected) as error:
        index_dataset(tmp_path / name, tmp_path / "out", "en")
    assert name in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "key 'content' is given twi"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a", "weight": -1}]}', r"weight: found -1, exp"),
        ("a.csv", 'messages\n"[{""role"": ""assistant"", ""content"": ""a"", ""weight"": NaN}]"\n', "NaN is not a n"),
        ("a.jsonl", '{"output": "a", "id": [123456789012345678901234567890, NaN]}', "line 1: not JSON"),
        ("a.md", "a\0b", "holds a NUL byte"),
        ("a.csv", "input,output\na,b\0\n", "line 2: holds a NUL byte"),
    ],
)  # fmt: skip
def test_more_mistakes(tmp_path: Path, name: str, data: str, expected: str) -> None:
    (tmp_path / name).write_text(data)
    with pytest.raises(UserError, match=expected):
        index_dataset(tmp_path / name, tmp_path / "out", "en")


def test_line_ends_of_old_macs_and_odd_csv_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\rthree")
    index_dataset(tmp_path / "a.txt", tmp_path / "a", "en")
    assert [record["output"] for record in read_dataset(tmp_path / "a")] == ["one", "two", "three"]
    (tmp_path / "a.csv").write_bytes(b"\n\ninput,output\n\na,b\n")
    index_dataset(tmp_path / "a.csv", tmp_path / "b", "en")
    assert read_dataset(tmp_path / "b") == [{"input": "a", "output": "b"}]


def test_lists_of_turns_as_columns_are_read_from_parquet_and_text_from_csv(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    columns = {"role": ["user", "assistant"], "content": ["q", "a"], "weight": [None, 0.0]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": columns}]), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "tools"], [json.dumps(turns), ""]])
    for name in ("a.parquet", "a.csv"):
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True)
        assert read_dataset(tmp_path / "out") == [{"messages": turns}]


class Endless(io.RawIOBase):
    """The same bytes again and again; more than 64 MB of them is a failure."""

    def __init__(self, piece: bytes) -> None:
        self._piece, self.taken = piece, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._piece * (len(buffer) // len(self._piece))
        buffer[: len(data)] = data
        self.taken += len(data)
        assert self.taken < 64 << 20, "it is read on and on"
        return len(data)


@pytest.mark.parametrize(
    ("format", "unit", "piece"),
    [
        ("csv", "", b"a"),
        ("csv", "", b"a,"),
        ("csv", "", b'"b\nb",'),
        ("tsv", "", b"a\t"),
        ("txt", "paragraph", b"a"),
        ("txt", "paragraph", b"a\n"),
        ("md", "file", b"a\n"),
        ("json", "", b"[[1, 2,"),
    ],
)
def test_a_record_that_never_ends_is_left_early(
    monkeypatch: pytest.MonkeyPatch, format: str, unit: str, piece: bytes
) -> None:
    class EndlessSource(DataSource):
        def open(self) -> Any:
            return io.BufferedReader(Endless(piece))

    monkeypatch.setattr(record_size, "MAX_RECORD_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"^a: a record is longer than 1 MB"):
        list(read_records(EndlessSource("a", format, text_unit=unit)))
