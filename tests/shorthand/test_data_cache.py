"""The cache of raw files that were indexed for `data`."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers.common import make_records, write_jsonl
from helpers.indexing import read_dataset

from fm9g.cli import main
from fm9g.data.prepare.column_mapping import ColumnMapping
from fm9g.data.prepare.sources import find_sources
from fm9g.errors import UserError
from fm9g.io.lock import wait_lock
from fm9g.shorthand import data_cache
from fm9g.shorthand.data_cache import DataCache, RawData

RECORDS = make_records(5)
LONG_AGO = 10**18  # ns; a file that changed just now is read again


@pytest.fixture
def cache(tmp_path: Path) -> DataCache:
    return DataCache(tmp_path / "cache")


def raw_data(path: Path, columns: ColumnMapping | None = None) -> RawData:
    return RawData(path.name, (str(path),), tuple(find_sources([str(path)])), columns)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that nobody is writing."""
    monkeypatch.setattr(data_cache, "_FRESH_NS", -(10**18))
    return write_jsonl(tmp_path / "a.jsonl", RECORDS)


def test_a_file_is_indexed_once(
    file: Path, cache: DataCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "fm9g")
    assert cache.find(raw_data(file)) is None
    folder = cache.find_or_build(raw_data(file))
    assert read_dataset(folder) == RECORDS
    assert f"data: indexing a.jsonl into {folder} (first use)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(data_cache, "_hash_file", None)  # it is not read again
    assert cache.find_or_build(raw_data(file)) == cache.find(raw_data(file)) == folder
    assert caplog.messages == [f"data: a.jsonl: 5 records in {folder} (indexed before)"]


def test_a_copy_and_a_file_that_was_touched_are_found_by_content(file: Path, cache: DataCache) -> None:
    folder = cache.find_or_build(raw_data(file))
    copy = write_jsonl(file.parent / "copy.jsonl", RECORDS)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    assert cache.find_or_build(raw_data(copy)) == cache.find_or_build(raw_data(file)) == folder


def test_a_changed_file_is_noticed_even_with_its_size_and_time(
    file: Path, cache: DataCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fm9g")
    before = cache.find_or_build(raw_data(file))
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"0.", b"9."))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = cache.find_or_build(raw_data(file))
    assert after != before
    assert read_dataset(after)[0]["output"] == RECORDS[0]["output"].replace("0.", "9.")
    assert "(a.jsonl has changed since 20" in caplog.text
    assert [(each.folder, each.is_current) for each in cache.datasets()] == [
        (folder, folder == after) for folder in sorted([before, after])
    ]
    assert [each.folder for each in cache.prune()] == [before]
    assert [each.folder for each in cache.datasets()] == [after]


def test_a_file_that_may_still_be_written_is_read_again(tmp_path: Path, cache: DataCache) -> None:
    raw = raw_data(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    folder = cache.find_or_build(raw)
    assert cache.find(raw) is None
    assert cache.find(raw, allow_fresh=True) == cache.find_or_build(raw) == folder


def test_how_a_file_is_read_makes_another_dataset(file: Path, cache: DataCache) -> None:
    swapped = cache.find_or_build(raw_data(file, ColumnMapping({"prompt": "output", "response": "input"})))
    assert swapped != cache.find_or_build(raw_data(file))
    assert read_dataset(swapped)[1] == {"input": RECORDS[1]["output"], "output": RECORDS[1]["input"]}


def test_a_folder_with_a_new_file_is_another_dataset(file: Path, cache: DataCache) -> None:
    folder = file.parent / "raw"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", RECORDS[:2])
    assert len(read_dataset(cache.find_or_build(raw_data(folder)))) == 2
    write_jsonl(folder / "2.jsonl", RECORDS[2:])
    assert read_dataset(cache.find_or_build(raw_data(folder))) == RECORDS


@pytest.mark.parametrize(("text", "language"), [("天地玄黄宇宙洪荒 is a text", "zh"), ("one word of Latin 字", "en")])
def test_the_language_is_recognized(text: str, language: str, tmp_path: Path, cache: DataCache) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    folder = cache.find_or_build(raw_data(file))
    assert f'"language": "{language}"' in (folder / "meta.json").read_text()


def test_a_bad_record_is_named_and_leaves_nothing(tmp_path: Path, cache: DataCache) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"input": "", "output": "x"}\n{"no": 1}\n')
    with pytest.raises(UserError, match=r"bad.jsonl, line 2: unknown format(.|\n)*data index --skip-bad"):
        cache.find_or_build(raw_data(file))
    assert cache.datasets() == []
    assert list((cache.folder / "entries").iterdir()) == []


def test_a_file_that_changes_while_it_is_indexed_leaves_nothing(
    file: Path, cache: DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = DataCache._build

    def build_and_write(self: DataCache, raw: RawData, folder: Path) -> None:
        build(self, raw, folder)
        write_jsonl(file, RECORDS[:1])

    monkeypatch.setattr(DataCache, "_build", build_and_write)
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was being read"):
        cache.find_or_build(raw_data(file))
    assert cache.datasets() == []


def test_a_folder_that_cannot_be_written_is_named_with_the_key(file: Path) -> None:
    (file.parent / "file").touch()
    with pytest.raises(
        UserError, match=r"indexed data cannot be stored here: .*; name another folder with data_cache_dir"
    ):
        DataCache(file.parent / "file" / "cache").find_or_build(raw_data(file))


def test_an_incomplete_dataset_is_built_again_and_leftovers_are_deleted(file: Path, cache: DataCache) -> None:
    folder = cache.find_or_build(raw_data(file))
    for name in ("index", "index.h5"):
        (folder / name).unlink()
    leftover = cache.folder / ".b-0123.5.tmp"
    leftover.mkdir()
    assert cache.find(raw_data(file)) is None
    assert cache.find_or_build(raw_data(file)) == folder
    assert read_dataset(folder) == RECORDS
    assert not leftover.exists()


def test_of_several_processes_one_indexes(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", make_records(300))
    code = (
        "import sys; from fm9g.log import log_to_console; from fm9g.shorthand.data_cache import *\n"
        "from fm9g.data.prepare.sources import find_sources\n"
        "with log_to_console():\n"
        "  raw = RawData('a', (sys.argv[1],), tuple(find_sources([sys.argv[1]])))\n"
        "  print(DataCache(sys.argv[2]).find_or_build(raw))"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "cache")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert len({folder for folder, _ in outputs}) == 1
    assert sum("first use" in log for _, log in outputs) == 1


def test_the_command_lists_and_prunes(file: Path, cache: DataCache, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cache.find_or_build(raw_data(file))
    words = ["data", "cache", "--data_cache_dir", str(cache.folder)]
    assert main(words) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[2:]] == [
        [folder.name, "0.0", "MB", str(file)]
    ]
    file.unlink()
    assert main(words) == 0
    assert "outdated" in capsys.readouterr().out
    assert main([*words, "--prune"]) == 0
    assert "1 indexed datasets deleted" in capsys.readouterr().out
    assert cache.datasets() == []


def test_a_process_waits_for_another_one_that_reads_the_same(
    file: Path, cache: DataCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fm9g")
    raw = raw_data(file)
    with wait_lock(cache.folder / "locks" / data_cache._entry_id(raw), ""):
        thread = threading.Thread(target=cache.find_or_build, args=(raw,))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert caplog.messages == ["data: another process reads a.jsonl"]
    thread.join(10)
    assert cache.find(raw)


def test_a_worker_that_runs_the_script_again_does_not_wait(
    file: Path, cache: DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="put its calls under `if __name__ =="):
        cache.find_or_build(raw_data(file))


def test_pruning_takes_the_locks_of_what_it_deletes(
    file: Path, cache: DataCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_data(file)
    folder = cache.find_or_build(raw)
    file.unlink()
    taken = []

    def recorded(path: Path, message: str) -> AbstractContextManager[None]:
        taken.append(path.name)
        return wait_lock(path, message)

    monkeypatch.setattr(data_cache, "wait_lock", recorded)
    cache.prune()
    assert taken == [folder.name.rpartition("-")[2], data_cache._entry_id(raw)]
