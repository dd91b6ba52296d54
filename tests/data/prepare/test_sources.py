"""Finding the files that paths, folders, globs and stdin name."""

import io
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from helpers.common import index_dataset, write_jsonl
from helpers.indexing import FILES, JSONL, RECORDS, read_dataset

from fm9g.cli import main
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.prepare.sources import find_sources
from fm9g.errors import UserError


def test_folders_and_globs_are_read_in_order_without_what_is_no_data(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "deep"
    raw.mkdir(parents=True)
    for number, record in enumerate(RECORDS):
        write_jsonl(raw / f"{number}.jsonl", [record])
    (raw / "README.md").write_text("about")
    (raw / ".hidden.jsonl").write_text("no")
    (raw / "picture.png").write_bytes(b"\x89PNG")
    index_dataset(tmp_path / "raw", tmp_path / "out", "zh")
    assert read_dataset(tmp_path / "out") == RECORDS
    index_dataset(tmp_path / "raw" / "**" / "[01].jsonl", tmp_path / "glob", "zh")
    assert read_dataset(tmp_path / "glob") == RECORDS[:2]
    for path, expected in (
        ("nothing*.jsonl", "matches no file"),
        ("none.jsonl", "none.jsonl: no such file"),
        ("raw/deep/picture.png", "its name has no known suffix"),
    ):
        with pytest.raises(UserError, match=expected):
            find_sources([str(tmp_path / path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in this folder has a known format"):
        find_sources([str(tmp_path / "empty")])


def test_stdin_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(JSONL)))
    index_dataset(Path("-"), tmp_path / "out", "zh")
    assert read_dataset(tmp_path / "out") == RECORDS


def test_a_folder_inside_what_is_read_is_no_output(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", RECORDS)
    arguments = ["data", "index", "--path", str(tmp_path), "--language", "zh", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()


def test_pipes_are_read_to_their_end(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", JSONL), ("b.json", FILES["a.json"])):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(data,))
        writer.start()
        index_dataset(tmp_path / name, tmp_path / "out", "zh", overwrite=True)
        writer.join()
        assert read_dataset(tmp_path / "out") == RECORDS


def test_a_file_is_read_once_and_nothing_hidden_is(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for folder in (raw / "sub", raw / ".ipynb_checkpoints", raw / ".d.99.tmp"):
        folder.mkdir(parents=True)
        write_jsonl(folder / "data.jsonl", RECORDS)
    (raw / "sub" / "loop").symlink_to(raw)
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "more.jsonl", RECORDS)
    (raw / "linked").symlink_to(tmp_path / "elsewhere")
    found = find_sources([str(raw), str(raw / "sub" / "data.jsonl"), str(raw / "**" / "*.jsonl")])
    assert sorted(Path(source.path).name for source in found) == ["data.jsonl", "more.jsonl"]
    (raw / "sub" / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone.jsonl: no such file; is it a broken link"):
        find_sources([str(raw)])
    (raw / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(UserError, match=r"self.jsonl: no such file"):
        find_sources([str(raw / "self.jsonl")], output=tmp_path / "out")
    with pytest.raises(UserError, match="lies in"):
        find_sources([str(raw / "**" / "*.jsonl")], output=raw / "out")
    with pytest.raises(UserError, match="a path is empty"):
        find_sources([""])


def test_a_pipe_that_is_named_as_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[b'{"input": "", "output": "a"}\n'], daemon=True)
    writer.start()
    assert index_dataset(path, tmp_path / "out", "en")["nlines"] == 1
    writer.join()


PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


@pytest.fixture
def dataset(tmp_path: Path, source: Path) -> Path:
    index_dataset(source, tmp_path / "out", "zh")
    return tmp_path / "out"


def test_a_dataset_is_read_by_its_data_alone(tmp_path: Path, dataset: Path, capsys) -> None:
    (dataset / "rejects.jsonl").write_text('{"file": "a", "reason": "b"}\n')
    arguments = ["--vocab_size", "300", "--output", str(tmp_path / "tokenizer")]
    assert main(["data", "tokenizer", str(dataset), *arguments]) == 0
    assert main(["data", "index", "--path", str(dataset), "--language", "zh", "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "data.jsonl").read_bytes() == (dataset / "data.jsonl").read_bytes()
    arguments = ["--language", "zh", "--split", "0.4", "--output", str(tmp_path / "split")]
    assert main(["data", "index", "--path", str(dataset), *arguments]) == 0
    (tmp_path / "split" / "rejects.jsonl").write_text("{}\n")
    assert (
        main(["data", "index", "--path", str(tmp_path / "split"), *arguments[:2], "--output", str(tmp_path / "b")]) == 0
    )
    assert len(IndexedDataset(tmp_path / "b")) == 3
    capsys.readouterr()
    for name in ("meta.json", "index", "index.h5"):  # as a shell names them for *
        part = str(dataset / name)
        assert main(["data", "index", "--path", part, "--language", "zh", "--output", str(tmp_path / "c")]) == 2
        assert f"{name}: found a part of an indexed dataset, expected data" in capsys.readouterr().err
    for name in ("index", "index.h5"):
        (dataset / name).unlink()
    assert main(["data", "index", "--path", str(dataset), "--language", "zh", "--output", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "data.jsonl").read_bytes() == (dataset / "data.jsonl").read_bytes()


@pytest.mark.parametrize(("start", "end", "format"), [("\ufeff \n[", "]", "json"), ("", "\n", "jsonl")])
def test_a_download_without_a_suffix_is_known_by_its_first_character(
    tmp_path: Path, start: str, end: str, format: str
) -> None:
    file = tmp_path / "train-7"
    file.write_text(f"{start}{json.dumps(RECORDS[0])}{end}", encoding="utf-8")
    assert [source.format for source in find_sources([str(file)])] == [format]
    index_dataset(file, tmp_path / "out", "zh")
    assert read_dataset(tmp_path / "out") == RECORDS[:1]
    file.write_text("plain text")
    with pytest.raises(UserError, match="no known suffix"):
        index_dataset(file, tmp_path / "other", "zh")
