"""Building an indexed dataset: bad records, splits, output folders, interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from helpers.common import ROOT, index_dataset, make_records, write_jsonl
from helpers.indexing import JSONL, RECORDS, read_dataset

from fm9g.cli import main
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import find_sources
from fm9g.errors import UserError

PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


@pytest.fixture
def dataset(tmp_path: Path, source: Path) -> Path:
    index_dataset(source, tmp_path / "out", "zh")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no record found, nothing to index"),
        (b"\n\n", "no record found, nothing to index"),
        (b'{"output": "a"}\nnot json\n', r"a.jsonl, line 2: not JSON.*not json"),
        (b'{"output": "a"}\n[1]\n', "line 2: found a JSON list, expected an object"),
        (b'{"output": 3}\n', "line 1: output: found int, expected a string"),
        (b'{"output": "\xff"}\n', "line 1: not JSON"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing_behind(tmp_path: Path, content: bytes, expected: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        index_dataset(source, tmp_path / "out", "en")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_missing_file_and_a_wrong_language_are_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        index_dataset(tmp_path / "none.jsonl", tmp_path / "out", "en")
    with pytest.raises(UserError, match="language: found 'fr', expected one of zh, en, code"):
        index_dataset(source, tmp_path / "out", "fr")


def test_an_output_folder_that_holds_something_is_kept(tmp_path: Path, source: Path, dataset: Path) -> None:
    (dataset / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="the folder is not empty"):
        index_dataset(source, dataset, "zh")
    source.write_text("bad")
    with pytest.raises(UserError, match="line 1"):
        index_dataset(source, dataset, "zh", overwrite=True)
    assert (dataset / "mine.txt").read_text() == "precious"
    write_jsonl(source, PAIRS[:1])
    index_dataset(source, dataset, "zh", overwrite=True)
    assert len(IndexedDataset(dataset)) == 1
    assert not (dataset / "mine.txt").exists()


def test_the_folder_of_the_source_is_never_the_output(source: Path) -> None:
    with pytest.raises(UserError, match=r"contains .*a.jsonl, which is an input"):
        index_dataset(source, source.parent, "zh", overwrite=True)
    assert source.exists()


def test_a_full_disk_is_reported_and_nothing_half_written_stays(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.File, "create_dataset", full)
    with pytest.raises(UserError, match="the disk is full; nothing was changed"):
        index_dataset(source, tmp_path / "out", "zh")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_records_in_another_language_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    chat = {"messages": [{"role": "user", "content": "你好吗"}, {"role": "assistant", "content": "fine"}]}
    records = [
        {"input": "问题 ab", "output": "x"},  # less than half
        {"input": "问题问题 ab", "output": "x"},
        {"input": "", "output": "文字"},
        {"input": "Why is it so?", "output": "文字"},
        chat,
    ]

    def read(folder: Path) -> list[dict]:
        dataset = IndexedDataset(folder)
        return [dataset[number] for number in range(len(dataset))]

    source = write_jsonl(tmp_path / "a.jsonl", records)
    command = ["data", "index", "--path", str(source), "--language", "zh", "--language-filter"]
    assert main([*command, "zh", "--output", str(tmp_path / "zh")]) == 0
    assert "2 records are not in zh and were left out" in capsys.readouterr().err
    assert read(tmp_path / "zh") == [records[1], records[2], chat]
    assert main([*command, "en", "--output", str(tmp_path / "en")]) == 0
    assert read(tmp_path / "en") == [records[3]]
    assert main([*command, "en", "--output", str(tmp_path / "as is"), "--as-is"]) == 2
    assert "does not go with --as-is" in capsys.readouterr().err
    write_jsonl(source, records[:1])
    assert main([*command, "zh", "--output", str(tmp_path / "none")]) == 2
    assert "language-filter: none of 1 records is in zh" in capsys.readouterr().err


def test_bad_records_can_be_left_out_and_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(JSONL + b'bad\n{"output": 3}\n\n' + JSONL)
    arguments = ["--path", str(source), "--language", "zh", "--output", str(tmp_path / "out"), "--skip-bad"]
    assert main(["data", "index", *arguments]) == 0
    assert read_dataset(tmp_path / "out") == RECORDS * 2
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["where"], reject["content"]) for reject in rejects] == [
        (str(source), "line 4", "bad"),
        (str(source), "line 5", '{"output": 3}'),
    ]
    assert rejects[1]["reason"] == "output: found int, expected a string"
    assert "warning: 2 bad records were left out" in capsys.readouterr().err
    source.write_bytes(b"bad\n")
    assert main(["data", "index", *arguments, "--overwrite"]) == 2
    assert "no record is good; the first" in capsys.readouterr().err
    assert read_dataset(tmp_path / "out") == RECORDS * 2


def test_a_split_is_of_the_share_and_keeps_copies_together(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_records(1000, 1) * 2)
    report = build_index(find_sources([str(source)]), tmp_path / "out", IndexConfig("en", split=0.1, seed=3))
    train, validation = (
        [json.dumps(r) for r in read_dataset(tmp_path / "out" / side)] for side in ("train", "validation")
    )
    assert len(train) + len(validation) == 2000
    assert len(validation) == pytest.approx(200, abs=60)
    assert not set(train) & set(validation)
    assert [meta["nlines"] for meta in report.metas.values()] == [len(train), len(validation)]
    other = build_index(find_sources([str(source)]), tmp_path / "other", IndexConfig("en", split=0.1, seed=4))
    assert [meta["nlines"] for meta in other.metas.values()] != [len(train), len(validation)]
    write_jsonl(source, RECORDS[:1])
    with pytest.raises(UserError, match="no record of 1 fell into validation"):
        build_index(find_sources([str(source)]), tmp_path / "few", IndexConfig("en", split=0.01))
    with pytest.raises(UserError, match=r"split: found 1\.5"):
        build_index(find_sources([str(source)]), tmp_path / "few", IndexConfig("en", split=1.5))


def test_an_interrupted_indexing_leaves_the_old_dataset(tmp_path: Path) -> None:
    index_dataset(write_jsonl(tmp_path / "old.jsonl", RECORDS), tmp_path / "out", "zh")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    arguments = ["--path", "-", "--language", "zh", "--output", str(tmp_path / "out"), "--overwrite"]
    for sign in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-m", "fm9g", "data", "index", *arguments],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(JSONL * 20_000)
        process.stdin.flush()
        for _ in range(200):  # until it writes
            if list(tmp_path.glob(".out.*.tmp/data.jsonl")):
                break
            time.sleep(0.1)
        process.send_signal(sign)
        process.communicate()
        assert process.returncode in (130, -signal.SIGKILL)
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    index_dataset(tmp_path / "old.jsonl", tmp_path / "out", "zh", overwrite=True)
    assert not list(tmp_path.glob(".out.*"))  # what the killed process left is gone


def test_what_is_left_out_is_listed_whole(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"output": "a", "output": "b"}, {"output": "c"}]')
    index_dataset(tmp_path / "a.json", tmp_path / "out", "en", skip_bad=True)
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["content"] == '{"output": "a", "output": "b"}'


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers: found -1"):
        index_dataset(write_jsonl(tmp_path / "a.jsonl", RECORDS), tmp_path / "out", "en", workers=-1)
