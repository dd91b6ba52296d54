"""Chunks of sources, and the processes that convert them."""

import json
from pathlib import Path

import pytest
from helpers.common import index_dataset, make_records, write_jsonl
from helpers.indexing import RECORDS

from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_tasks import convert_source
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import DataSource, find_sources
from fm9g.errors import UserError


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_gives_the_same_files(tmp_path: Path, workers: int) -> None:
    """Ranges far shorter than the lines, so that their borders fall everywhere."""
    lines = [*make_records(300, 5, longest=60), {"input": "", "output": "长" * 5000}, *make_records(20, 6)]
    full = write_jsonl(tmp_path / "a.jsonl", lines)
    index_dataset(full, tmp_path / "whole", "zh")

    def index_in_small_chunks(output: Path) -> dict:
        return build_index(find_sources([str(full)]), output, IndexConfig("zh"), workers, chunk_bytes=101).metas[output]

    assert index_in_small_chunks(tmp_path / "parts") == json.loads((tmp_path / "whole" / "meta.json").read_text())
    for name in ("data.jsonl", "index", "index.h5"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with full.open("ab") as file:
        file.write(b"bad\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 322: not JSON.*'bad'"):
        index_in_small_chunks(tmp_path / "no")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (source,) = find_sources([str(file)])
    with pytest.raises(UserError, match="was changed while it was being read"):
        for _ in convert_source(source, IndexConfig("zh")):
            with file.open("ab") as writer:
                writer.write(b" ")


def test_few_long_records_are_held_together(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    turns = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 40}]
    file.write_text(json.dumps([{"messages": turns}] * 7))
    results = convert_source(DataSource(str(file), "json"), IndexConfig("en"), chunk_bytes=100)
    assert [result.read for result in results] == [2, 2, 2, 1]
