"""Compressed files of several streams, damaged ones, and their memory."""

import bz2
import lzma
from pathlib import Path

import pytest
from helpers.common import index_dataset
from helpers.indexing import JSONL, RECORDS, read_dataset

from fm9g.data.prepare.decompress import open_decompressed
from fm9g.errors import UserError


@pytest.mark.parametrize("kind", ["xz", "bz2"])
def test_streams_of_one_compressed_file_are_all_read_or_refused(tmp_path: Path, kind: str) -> None:
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[kind]
    parts = [compress(JSONL) for _ in range(3)]
    (tmp_path / f"good.jsonl.{kind}").write_bytes(b"".join(parts))
    index_dataset(tmp_path / f"good.jsonl.{kind}", tmp_path / "out", "zh")
    assert read_dataset(tmp_path / "out") == RECORDS * 3
    for number, damaged in enumerate((b"X" + parts[1][1:], b"junk")):
        bad = tmp_path / f"bad{number}.jsonl.{kind}"
        bad.write_bytes(parts[0] + damaged)
        with pytest.raises(UserError, match=f"bad{number}.*cannot be decompressed"):
            index_dataset(bad, tmp_path / "no", "zh")


def test_xz_that_wants_much_memory_is_refused(tmp_path: Path) -> None:
    import lzma

    file = tmp_path / "a.jsonl.xz"
    file.write_bytes(lzma.compress(b'{"input": "", "output": "a"}\n'))
    with (
        pytest.raises(UserError, match=r"a\.jsonl\.xz: cannot be decompressed.*[Mm]emory"),
        open_decompressed(str(file), ".xz", xz_memory_bytes=1 << 20) as stream,
    ):
        stream.read()
