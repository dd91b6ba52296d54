"""The four files of an indexed dataset."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.common import index_dataset, write_jsonl

PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


@pytest.fixture
def dataset(tmp_path: Path, source: Path) -> Path:
    index_dataset(source, tmp_path / "out", "zh")
    return tmp_path / "out"


def test_the_four_files_hold_what_the_format_says(dataset: Path, source: Path) -> None:
    data = (dataset / "data.jsonl").read_bytes()
    lines = data.splitlines(keepends=True)
    bounds = [0, *np.cumsum([len(line) for line in lines]).tolist()]
    assert data == source.read_bytes()
    assert [int(line) for line in (dataset / "index").read_text().split()] == bounds
    assert h5py.File(dataset / "index.h5")["index"][:].tolist() == bounds
    meta = json.loads((dataset / "meta.json").read_text())
    expected_tokens = [0.7 * len(line.decode().strip()) for line in lines]
    assert meta == {
        "language": "zh",
        "nlines": 3,
        "nbytes": len(data),
        "length_distribute": {"less_4k": 3} | dict.fromkeys(list(meta["length_distribute"])[1:], 0),
        "avg_token_per_line": pytest.approx(sum(expected_tokens) / 3),
        "data_sample": PAIRS[0],
        "shapes": {"input/output": 3},
        "canonical_form": 1,
    }
    assert list(meta["length_distribute"]) == [
        "less_4k", "4k-8k", "8k-16k", "16k-32k", "32k-64k", "64k-128k", "128k-256k", "more_256k",
    ]  # fmt: skip


def test_lengths_fall_into_their_buckets_and_long_samples_are_cut(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"output": "w " * words} for words in (10, 3000, 200_000)])
    meta = index_dataset(source, tmp_path / "out", "en")
    counts = {name: count for name, count in meta["length_distribute"].items() if count}
    assert counts == {"less_4k": 1, "4k-8k": 1, "more_256k": 1}
    source = write_jsonl(tmp_path / "b.jsonl", [{"output": "x" * 51}])
    assert index_dataset(source, tmp_path / "out2", "en")["data_sample"] == {"input": "", "output": "x" * 50 + "..."}
