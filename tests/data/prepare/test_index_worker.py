"""From a record to a line of data.jsonl: no value is changed."""

import json
from pathlib import Path

import pytest
from helpers.common import index_dataset, write_jsonl
from helpers.indexing import read_dataset

from fm9g.errors import UserError


def test_integers_beyond_64_bits_and_escaped_nul_are_kept(tmp_path: Path) -> None:
    line = b'{"input": "", "output": "a\\u0000b", "id": 123456789012345678901234567890}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    assert read_dataset(tmp_path / "out")[0]["output"] == "a\0b"


def test_numbers_are_never_changed(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.json").write_text('[{"a": 1e999}]')
    pyarrow.parquet.write_table(pyarrow.table({"a": [1.0, float("nan")]}), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        with pytest.raises(UserError, match="not finite"):
            index_dataset(tmp_path / name, tmp_path / "out", "en", as_is=True)
    call = '{"name": "f", "arguments": {"n": 1180591620717411303424}}'
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}, {"from": "gpt", "value": "a"}]
    write_jsonl(tmp_path / "calls.jsonl", [{"conversations": turns}])
    with pytest.raises(UserError, match="cannot be written as JSON: Integer exceeds 64-bit range"):
        index_dataset(tmp_path / "calls.jsonl", tmp_path / "calls", "en")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_stored_holds_no_number_that_is_not_finite(tmp_path: Path, number: float) -> None:
    import pyarrow
    import pyarrow.parquet

    def record(argument: float, more: float) -> dict:
        calls = [{"function": {"name": "f", "arguments": {"n": argument}}}]
        tools = [{"name": "f", "n": [more]}]
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}

    for bad in (record(number, 1), record(1, number), {"text": "a", "weight": number}):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([bad]), tmp_path / "a.parquet")
        text = json.dumps(bad).replace("Infinity", "1e999")
        (tmp_path / "a.json").write_text(f"[{text}]")
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"a\.parquet, row 1: .*(not finite|weight: found (nan|inf), expected)"):
            index_dataset(tmp_path / "a.parquet", tmp_path / "out", "en")
        with pytest.raises(UserError, match=r"a\.json, record 1 .*(NaN|not finite|found inf)"):
            index_dataset(tmp_path / "a.json", tmp_path / "out", "en")
        with pytest.raises(UserError, match=r"a\.jsonl, line 1: not JSON"):
            index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    left_out = {"text": "a", "perplexity": number}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([left_out]), tmp_path / "a.parquet")
    index_dataset(tmp_path / "a.parquet", tmp_path / "out", "en")
    assert read_dataset(tmp_path / "out") == [{"input": "", "output": "a"}]


PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


def test_byte_order_mark_crlf_blank_lines_and_a_missing_newline_are_put_right(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    one, other = b'{"input": "", "output": "a"}', b'{"input":"","output":"b"}'
    source.write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\n  \n" + other)
    index_dataset(source, tmp_path / "out", "en")
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == one + b"\n" + other + b"\n"
