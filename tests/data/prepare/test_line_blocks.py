"""Lines that are longer than a block."""

from pathlib import Path

import pytest
from helpers.common import index_dataset
from helpers.indexing import read_dataset

from fm9g.data.prepare import record_size
from fm9g.errors import UserError


def test_a_line_far_longer_than_a_block_is_a_line_and_one_that_never_ends_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = b'{"input": "", "output": "' + b"word " * (2 << 20) + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "", "output": "a"}\n' + long + b'{"input": "", "output": "b"}\n')
    meta = index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    assert (meta["nlines"], meta["length_distribute"]["more_256k"]) == (3, 1)
    assert read_dataset(tmp_path / "out")[2]["output"] == "b"
    monkeypatch.setattr(record_size, "MAX_RECORD_BYTES", 1 << 20)
    with pytest.raises(UserError, match="a record is longer than 1 MB; is this the right format"):
        index_dataset(tmp_path / "a.jsonl", tmp_path / "no", "en")
