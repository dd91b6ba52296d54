"""Every kind of file gives the same records; and each mistake in one has an answer."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.common import ROOT, index_dataset, make_records, write_jsonl

from fm9g.cli import main
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.prepare import sources
from fm9g.data.prepare.index_builder import build_index, iter_texts
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import find_sources
from fm9g.errors import UserError

RECORDS = [
    {"input": "问题", "output": "回答 一\n第二行"},
    {"input": "", "output": 'quotes " and \\ and \u2028'},
    {"input": "x", "output": "last"},
]
JSONL = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)


def content(folder: Path) -> list[dict]:
    opened = IndexedDataset(folder)
    return [opened[i] for i in range(len(opened))]


def zst(data: bytes) -> bytes:
    import pyarrow

    sink = io.BytesIO()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
        stream.flush()
        sink.close = lambda: None  # type: ignore[method-assign]
    return sink.getvalue()


def as_csv(delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["input", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


FILES = {
    "a.jsonl": JSONL,
    "a.jsonl.gz": gzip.compress(JSONL[:70]) + gzip.compress(JSONL[70:]),
    "a.jsonl.xz": lzma.compress(JSONL),
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.ndjson": JSONL.removesuffix(b"\n"),
    "a.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode("utf-8-sig"),
    "objects.json": "\n\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "lines.json": JSONL,
    "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "a.csv": as_csv(),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(),
    "a.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    index_dataset(tmp_path / name, tmp_path / "out", "zh")
    assert content(tmp_path / "out") == RECORDS


def test_zst_parquet_and_a_datasets_folder_give_the_same_records(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl.zst").write_bytes(zst(JSONL))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(RECORDS)
    made.save_to_disk(str(tmp_path / "folder"))
    for name in ("a.jsonl.zst", "a.parquet", "folder"):
        index_dataset(tmp_path / name, tmp_path / "out", "zh", overwrite=True)
        assert content(tmp_path / "out") == RECORDS, name
    datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="holds several splits; name one of them: test, train"):
        find_sources([str(tmp_path / "splits")])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match=r"bad.parquet: not a parquet file"):
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
        return [record["output"] for record in content(tmp_path / "out")]

    assert outputs("a.txt") == ["one", "two", "three"]
    assert outputs("a.txt", "paragraph") == ["one\ntwo", "three"]
    assert outputs("a.md") == ["one\ntwo\n\n \nthree"]
    assert list(iter_texts(find_sources([str(tmp_path / "a.txt")]))) == ["one", "two", "three"]


def test_folders_and_globs_are_read_in_order_without_what_is_no_data(tmp_path: Path) -> None:
    raw = tmp_path / "raw" / "deep"
    raw.mkdir(parents=True)
    for number, record in enumerate(RECORDS):
        write_jsonl(raw / f"{number}.jsonl", [record])
    (raw / "README.md").write_text("about")
    (raw / ".hidden.jsonl").write_text("no")
    (raw / "picture.png").write_bytes(b"\x89PNG")
    index_dataset(tmp_path / "raw", tmp_path / "out", "zh")
    assert content(tmp_path / "out") == RECORDS
    index_dataset(tmp_path / "raw" / "**" / "[01].jsonl", tmp_path / "glob", "zh")
    assert content(tmp_path / "glob") == RECORDS[:2]
    for path, expected in (
        ("nothing*.jsonl", "matches no file"),
        ("none.jsonl", "none.jsonl: no such file"),
        ("raw/deep/picture.png", "its name tells no format that is read"),
    ):
        with pytest.raises(UserError, match=expected):
            find_sources([str(tmp_path / path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in this folder has a format that is read"):
        find_sources([str(tmp_path / "empty")])


def test_stdin_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(JSONL)))
    index_dataset(Path("-"), tmp_path / "out", "zh")
    assert content(tmp_path / "out") == RECORDS


def test_a_folder_inside_what_is_read_is_no_output(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", RECORDS)
    arguments = ["data", "index", "--path", str(tmp_path), "--language", "zh", "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert not (tmp_path / "out").exists()


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
        ("a.csv", b"input,output\na,b\nc\n", "line 3: 1 columns, expected 2"),
        ("a.csv", b"input,output\na,b,c\n", "line 2: 3 columns, expected 2"),
        ("a.csv", b"input,input\na,b\n", "names each column once"),
        ("a.csv", b'input,output\na,"b\n', "not csv"),
        ("a.csv", b"input,output\na,\xff\n", "not UTF-8"),
        ("a.csv", b"", "nothing to index"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], "cannot be decompressed, is it whole"),
        ("a.jsonl.gz", JSONL, "cannot be decompressed, is it whole"),
        ("a.jsonl.xz", lzma.compress(JSONL)[:-9], "cannot be decompressed, is it whole"),
        ("a.jsonl.bz2", bz2.compress(JSONL)[:-9], "cannot be decompressed, is it whole"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_left(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=expected) as error:
        index_dataset(tmp_path / name, tmp_path / "out", "en")
    assert name in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_integers_beyond_64_bits_and_escaped_nul_are_kept(tmp_path: Path) -> None:
    line = b'{"input": "", "output": "a\\u0000b", "id": 123456789012345678901234567890}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    assert content(tmp_path / "out")[0]["output"] == "a\0b"


def test_a_line_far_longer_than_a_block_is_a_line_and_one_that_never_ends_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = b'{"input": "", "output": "' + b"word " * (2 << 20) + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "", "output": "a"}\n' + long + b'{"input": "", "output": "b"}\n')
    meta = index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    assert (meta["nlines"], meta["length_distribute"]["more_256k"]) == (3, 1)
    assert content(tmp_path / "out")[2]["output"] == "b"
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    with pytest.raises(UserError, match="a record is longer than 1 MB; is this the right format"):
        index_dataset(tmp_path / "a.jsonl", tmp_path / "no", "en")


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_gives_the_same_files(tmp_path: Path, workers: int, monkeypatch) -> None:
    """Ranges far shorter than the lines, so that their borders fall everywhere."""
    from fm9g.data.prepare import index_builder

    lines = [*make_records(300, 5, longest=60), {"input": "", "output": "长" * 5000}, *make_records(20, 6)]
    whole = write_jsonl(tmp_path / "a.jsonl", lines)
    index_dataset(whole, tmp_path / "whole", "zh")
    monkeypatch.setattr(index_builder, "_CHUNK_BYTES", 101)
    meta = index_dataset(whole, tmp_path / "parts", "zh", workers=workers)
    assert meta == json.loads((tmp_path / "whole" / "meta.json").read_text())
    for name in ("data.jsonl", "index", "index.h5"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with whole.open("ab") as file:
        file.write(b"bad\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 322: not JSON.*'bad'"):
        index_dataset(whole, tmp_path / "no", "zh", workers=workers)


def test_bad_records_can_be_left_out_and_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(JSONL + b'bad\n{"output": 3}\n\n' + JSONL)
    arguments = ["--path", str(source), "--language", "zh", "--output", str(tmp_path / "out"), "--skip-bad"]
    assert main(["data", "index", *arguments]) == 0
    assert content(tmp_path / "out") == RECORDS * 2
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["where"], reject["content"]) for reject in rejects] == [
        (str(source), "line 4", "bad"),
        (str(source), "line 5", '{"output": 3}'),
    ]
    assert rejects[1]["reason"] == "output: found int, expected a string"
    assert "2 bad records were left out" in capsys.readouterr().out
    source.write_bytes(b"bad\n")
    assert main(["data", "index", *arguments, "--overwrite"]) == 2
    assert "no record is good; the first" in capsys.readouterr().err
    assert content(tmp_path / "out") == RECORDS * 2


def test_a_split_is_of_the_share_and_keeps_copies_together(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_records(1000, 1) * 2)
    report = build_index(find_sources([str(source)]), tmp_path / "out", IndexConfig("en", split=0.1, seed=3))
    train, validation = ([json.dumps(r) for r in content(tmp_path / "out" / side)] for side in ("train", "validation"))
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


def test_other_keys_are_mapped_or_kept_as_they_are(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"Question": "q", "Complex_CoT": "c", "Response": "r"}])
    arguments = ["data", "index", "--path", str(source), "--language", "en", "--output"]
    assert main([*arguments, str(tmp_path / "no")]) == 2
    assert main([*arguments, str(tmp_path / "a"), "--columns", "prompt=Question,response=Response"]) == 0
    assert content(tmp_path / "a") == [{"input": "q", "output": "r"}]
    (tmp_path / "columns.json").write_text('{"prompt": "Question", "response": "Response"}')
    assert main([*arguments, str(tmp_path / "b"), "--columns", str(tmp_path / "columns.json")]) == 0
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert main([*arguments, str(tmp_path / "c"), "--as-is"]) == 0
    assert content(tmp_path / "c") == [{"Question": "q", "Complex_CoT": "c", "Response": "r"}]


def test_a_dataset_info_of_llama_factory_is_understood(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [{"q": "a", "a": "b"}])
    info = {"mine": {"file_name": "mine.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    path = ["--path", str(tmp_path / "dataset_info.json"), "--dataset", "mine"]
    output = tmp_path.parent / f"{tmp_path.name}-out"
    assert main(["data", "index", *path, "--language", "en", "--output", str(output)]) == 0
    assert content(output) == [{"input": "a", "output": "b"}]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    from fm9g.data.prepare import index_builder

    convert = index_builder.convert_range

    def growing(*arguments):
        with source.open("ab") as file:
            file.write(b" ")
        return convert(*arguments)

    monkeypatch.setattr(index_builder, "convert_range", growing)
    with pytest.raises(UserError, match="was changed while it was read"):
        index_dataset(source, tmp_path / "out", "zh")


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


def test_pipes_are_read_to_their_end(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", JSONL), ("b.json", FILES["a.json"])):
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(data,))
        writer.start()
        index_dataset(tmp_path / name, tmp_path / "out", "zh", overwrite=True)
        writer.join()
        assert content(tmp_path / "out") == RECORDS


@pytest.mark.parametrize("kind", ["xz", "bz2"])
def test_streams_of_one_compressed_file_are_all_read_or_refused(tmp_path: Path, kind: str) -> None:
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[kind]
    parts = [compress(JSONL) for _ in range(3)]
    (tmp_path / f"good.jsonl.{kind}").write_bytes(b"".join(parts))
    index_dataset(tmp_path / f"good.jsonl.{kind}", tmp_path / "out", "zh")
    assert content(tmp_path / "out") == RECORDS * 3
    for number, damaged in enumerate((b"X" + parts[1][1:], b"junk")):
        bad = tmp_path / f"bad{number}.jsonl.{kind}"
        bad.write_bytes(parts[0] + damaged)
        with pytest.raises(UserError, match=f"bad{number}.*cannot be decompressed"):
            index_dataset(bad, tmp_path / "no", "zh")


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
    with pytest.raises(UserError, match=r"gone.jsonl: no such file; a link to nothing"):
        find_sources([str(raw)])
    (raw / "self.jsonl").symlink_to("self.jsonl")
    with pytest.raises(UserError, match=r"self.jsonl: no such file"):
        find_sources([str(raw / "self.jsonl")], output=tmp_path / "out")
    with pytest.raises(UserError, match="lies in"):
        find_sources([str(raw / "**" / "*.jsonl")], output=raw / "out")
    with pytest.raises(UserError, match="a path is empty"):
        find_sources([""])


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "key 'content' is given twi"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a", "weight": -1}]}', r"weight: found -1, exp"),
        ("a.csv", 'messages\n"[{""role"": ""assistant"", ""content"": ""a"", ""weight"": NaN}]"\n', "NaN is no number"),
        ("a.jsonl", '{"output": "a", "id": [123456789012345678901234567890, NaN]}', "line 1: not JSON"),
        ("a.md", "a\0b", "holds a NUL byte"),
        ("a.csv", "input,output\na,b\0\n", "line 2: holds a NUL byte"),
    ],
)  # fmt: skip
def test_more_mistakes(tmp_path: Path, name: str, data: str, expected: str) -> None:
    (tmp_path / name).write_text(data)
    with pytest.raises(UserError, match=expected):
        index_dataset(tmp_path / name, tmp_path / "out", "en")


def test_what_is_left_out_is_listed_whole(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"output": "a", "output": "b"}, {"output": "c"}]')
    index_dataset(tmp_path / "a.json", tmp_path / "out", "en", skip_bad=True)
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["content"] == '{"output": "a", "output": "b"}'


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


def test_line_ends_of_old_macs_and_odd_csv_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\rthree")
    index_dataset(tmp_path / "a.txt", tmp_path / "a", "en")
    assert [record["output"] for record in content(tmp_path / "a")] == ["one", "two", "three"]
    (tmp_path / "a.csv").write_bytes(b"\n\ninput,output\n\na,b\n")
    index_dataset(tmp_path / "a.csv", tmp_path / "b", "en")
    assert content(tmp_path / "b") == [{"input": "a", "output": "b"}]


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers: found -1"):
        index_dataset(write_jsonl(tmp_path / "a.jsonl", RECORDS), tmp_path / "out", "en", workers=-1)


CALLS = [
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"city": "P"}}}],
            },
            {"role": "tool", "content": "3", "name": "f"},
        ],
        "tools": [{"name": "f", "parameters": {"properties": {"city": {"type": "string", "enum": ["P", None]}}}}],
        "system": None,
    },
    {
        "messages": [
            {"role": "user", "content": "add?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"n": 1}}}]},
        ],
        "tools": [{"name": "add", "parameters": {"properties": {"n": {"type": "integer", "minimum": 0}}}}],
        "system": "s",
    },
]


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
    as_lines = content(tmp_path / "lines")
    assert as_lines[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "P"}
    for name in ("a.parquet", "saved"):
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True)
        assert content(tmp_path / "out") == as_lines, name
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True, as_is=True)
        assert content(tmp_path / "out") == CALLS, name
    nulls = json.loads(json.dumps(CALLS).replace('"P"', "null"))
    for name in ("nulls.jsonl", "nulls.json"):
        (tmp_path / name).write_text(json.dumps(nulls[0]))
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True)
        (record,) = content(tmp_path / "out")
        assert record["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


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
        assert content(tmp_path / "out") == [{"messages": turns}]


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
    assert content(tmp_path / "out") == [{"input": "", "output": "a"}]


DEEP, LONG = "[" * 100_000 + "]" * 100_000, "1" * 5000
OBJECTS = '{"a":' * 100_000 + "1" + "}" * 100_000
GOOD = '{"input": "q", "output": "a"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps({"messages": [], "tools": DEEP}), "messages: the conversation is empty"),
        (json.dumps({**CALLS[1], "tools": DEEP}), "tools: JSON that is nested too deeply: '[[["),
        (json.dumps({**CALLS[1], "tools": f'[{{"name": "f", "n": {LONG}}}]'}), "tools: not JSON: an integer of 5000"),
        (json.dumps(CALLS[1]).replace('{"n": 1}', json.dumps(OBJECTS)), "messages[1].tool_calls: arguments of add: JS"),
        (json.dumps(CALLS[1]).replace('{"n": 1}', OBJECTS), "JSON that is nested too deeply"),
        (json.dumps(CALLS[1]).replace('{"n": 1}', f'{{"n": {"[" * 300 + "]" * 300}}}'), "JSON that is nested too deep"),
        (f'{{"input": "q", "output": "a", "meta": {DEEP}}}', "JSON that is nested too deeply"),
        (f'{{"input": "q", "output": "a", "meta": "\\"]}}", "more": [1, {OBJECTS}]}}', "JSON that is nested too deep"),
        (f'{{"input": "q", "output": "a", "id": {LONG}}}', ""),
        (f'{{"messages": [], "id": {LONG}}}', ""),
    ],
    ids=range(10),
)
def test_what_nests_too_deeply_or_is_too_long_is_a_bad_record(tmp_path: Path, line: str, reason: str) -> None:
    files = {"a.jsonl": f"{GOOD}\n{line}\n{GOOD}\n", "a.json": f"[{GOOD}, {line},\n{GOOD}]"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        for settings in ({}, {"as_is": True}):
            with contextlib.suppress(UserError):
                index_dataset(tmp_path / name, tmp_path / f"no-{name}", "en", **settings)
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True, skip_bad=True)
        rejects = [json.loads(reject) for reject in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
        assert content(tmp_path / "out") == [json.loads(GOOD)] * 2
        assert [reject["where"] for reject in rejects] == ["line 2" if name == "a.jsonl" else "record 2 (line 1)"]
        assert rejects[0]["reason"].startswith(reason)


def test_how_deep_is_too_deep_depends_on_python_but_never_ends_in_a_traceback(tmp_path: Path) -> None:
    for levels in range(850, 1030, 10):
        line = f'{{"input": "q", "output": "a", "meta": {"[" * levels + "]" * levels}}}'
        for name in ("a.jsonl", "a.json"):
            (tmp_path / name).write_text(f"{GOOD}\n{line}\n" if name == "a.jsonl" else f"[{GOOD}, {line}]")
            index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True, skip_bad=True)
            assert content(tmp_path / "out")[0] == json.loads(GOOD)


def test_the_end_of_a_deep_record_is_not_looked_for_in_a_string_that_is_cut_off(tmp_path: Path) -> None:
    record = f'{{"meta": {DEEP}, "text": "{"}" * (3 * sources.CHUNK_BYTES)}"}}'
    (tmp_path / "a.json").write_text(f"[{record}, {GOOD}]")
    index_dataset(tmp_path / "a.json", tmp_path / "out", "en", skip_bad=True)
    assert content(tmp_path / "out") == [json.loads(GOOD)]


def test_a_deep_record_at_the_end_of_a_json_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{GOOD}, {{"text": "a", "meta": "[" , "more": {DEEP[:150_000]}')
    with pytest.raises(UserError, match=r"a\.json, line 1, record 2: not JSON: it breaks off"):
        index_dataset(tmp_path / "a.json", tmp_path / "out", "en")


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
