"""Indexed datasets: what is written, both kinds of index read, and what happens to bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.common import index_dataset, write_jsonl

from fm9g.cli import main
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT, count_units
from fm9g.errors import UserError

RECORDS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", RECORDS)


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
        "data_sample": RECORDS[0],
        "shapes": {"input/output": 3},
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


def test_tokens_are_estimated_by_language() -> None:
    lines = ["一二三 四", "one two\tthree ", "", " x"]
    block = np.frombuffer("".join(line + "\n" for line in lines).encode(), np.uint8)
    ends = np.cumsum([len(line.encode()) + 1 for line in lines])
    assert count_units(block, ends, "zh").tolist() == [len(line) for line in lines]
    for language in ("en", "code"):
        assert count_units(block, ends, language).tolist() == [len(line.split()) for line in lines]
    assert TOKENS_PER_UNIT == {"zh": 0.7, "en": 1.5, "code": 1.5}


def test_every_record_is_read_the_first_one_included(dataset: Path) -> None:
    opened = IndexedDataset(dataset)
    assert [opened[i] for i in range(len(opened))] == RECORDS
    with pytest.raises(IndexError):
        opened[3]


@pytest.mark.parametrize("keep", ["index", "index.h5"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_either_index_file_and_both_kinds_of_bounds_are_read(
    dataset: Path, keep: str, published: bool, chunked: bool
) -> None:
    bounds = h5py.File(dataset / "index.h5")["index"][:]
    if published:  # the published converter wrote the N line ends only
        bounds = bounds[1:]
    (dataset / "index").write_text("\n".join(map(str, bounds)) + "\n")
    with h5py.File(dataset / "index.h5", "w") as file:
        file.create_dataset("index", data=bounds, chunks=(1,) if chunked else None)
    os.remove(dataset / ("index" if keep == "index.h5" else "index.h5"))
    opened = IndexedDataset(dataset)
    assert [opened[i] for i in range(len(opened))] == RECORDS


def test_byte_order_mark_crlf_blank_lines_and_a_missing_newline_are_put_right(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    one, other = b'{"input": "", "output": "a"}', b'{"input":"","output":"b"}'
    source.write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\n  \n" + other)
    index_dataset(source, tmp_path / "out", "en")
    assert (tmp_path / "out" / "data.jsonl").read_bytes() == one + b"\n" + other + b"\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "nothing to index, no record in it"),
        (b"\n\n", "nothing to index, no record in it"),
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
    with pytest.raises(UserError, match="the folder holds something"):
        index_dataset(source, dataset, "zh")
    source.write_text("bad")
    with pytest.raises(UserError, match="line 1"):
        index_dataset(source, dataset, "zh", overwrite=True)
    assert (dataset / "mine.txt").read_text() == "precious"
    write_jsonl(source, RECORDS[:1])
    index_dataset(source, dataset, "zh", overwrite=True)
    assert len(IndexedDataset(dataset)) == 1
    assert not (dataset / "mine.txt").exists()


def test_the_folder_of_the_source_is_never_the_output(source: Path) -> None:
    with pytest.raises(UserError, match=r"holds .*a.jsonl, which is read"):
        index_dataset(source, source.parent, "zh", overwrite=True)
    assert source.exists()


def test_an_index_that_does_not_match_its_data_is_refused(dataset: Path) -> None:
    data = dataset / "data.jsonl"
    whole = data.read_bytes()
    data.write_bytes(whole + b'{"output": "more"}\n')
    with pytest.raises(UserError, match="one of them was changed; index it again"):
        IndexedDataset(dataset)
    data.write_bytes(whole.replace(b'"}\n{', b'"}{\n'))  # as long as before, other line ends
    opened = IndexedDataset(dataset)
    with pytest.raises(UserError, match=r"data.jsonl, line 1: the index does not match the data"):
        opened[0]


def test_a_broken_or_missing_index_is_reported(dataset: Path) -> None:
    (dataset / "index.h5").write_bytes(b"garbage")
    with pytest.raises(UserError, match="the index cannot be read"):
        IndexedDataset(dataset)
    os.remove(dataset / "index.h5")
    os.remove(dataset / "index")
    with pytest.raises(UserError, match=r"neither index.h5 nor index is there"):
        IndexedDataset(dataset)
    with pytest.raises(UserError, match="no indexed dataset here"):
        IndexedDataset(dataset.parent)


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


def notes(tmp_path: Path, records: list[dict], capsys: pytest.CaptureFixture, *options: str) -> list[str]:
    """What `fm9g data index` notes of records."""
    source = write_jsonl(tmp_path / "noted.jsonl", records)
    output = ["--output", str(tmp_path / "noted"), "--overwrite"]
    capsys.readouterr()
    assert main(["data", "index", "--path", str(source), "--language", "en", *output, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def test_keys_that_are_left_out_are_noted_the_most_frequent_first(tmp_path: Path, capsys) -> None:
    turn = {"role": "assistant", "content": "a", "refusal": "no", "audio": None}
    records = [{"messages": [turn], "id": n, "more": ""} for n in range(3)] + [{"output": "a", "id": 1}]
    assert notes(tmp_path, records, capsys) == ["keys left out: id (4), turn.refusal (3)"]
    many = {f"k{n:02}": n for n in range(12)}
    assert notes(tmp_path, [{"output": "a", **many}, {"output": "a", "k11": 1}], capsys) == [
        f"keys left out: k11 (2), {', '.join(f'k{n:02} (1)' for n in range(9))} and 2 more"
    ]
    assert notes(tmp_path, [{"output": "a", **many}], capsys, "--as-is") == []
    assert notes(tmp_path, [{"input": "q", "output": "a"}], capsys) == []


def test_a_bad_record_counts_for_no_note(tmp_path: Path, capsys) -> None:
    bad = {"messages": [{"role": "user", "content": "{{x}}", "id": 1, "weight": 0}]}
    assert notes(tmp_path, [bad, {"output": "a"}], capsys, "--skip-bad") == [
        f"1 bad records were left out: {tmp_path / 'noted' / 'rejects.jsonl'}"
    ]


def test_marks_thoughts_and_calls_are_noted(tmp_path: Path, capsys) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    masked = {**answer, "train": False}
    records = [
        {"messages": [user, masked, user, answer]},
        {"messages": [user, masked, user, masked], "id": 1},
        {"messages": [user, {**answer, "weight": 0.5, "thinking": "t"}]},
        {"messages": [user, {**answer, "content_weights": [[1, 1]]}, {**masked, "reasoning": "t"}]},
        {"messages": [user, {**answer, "content": "ab", "content_weights": [[1, 1], [1, 0]]}]},
        {"messages": [user, answer], "tools": [{"name": "f"}]},
        {"messages": [{**answer, "tool_calls": [{"function": {"name": "f"}}]}]},
        {"input": "q", "output": "a", "weight": 0},
        {"text": "a", "loss_scale": 2},
        {"text": "a"},
    ]
    assert notes(tmp_path, records, capsys) == [
        "keys left out: id (1)",
        "of the records, 2 have thoughts, 2 have tools or calls",
        "5 turns are not trained on, 3 have another weight than 1",
        "2 records have nothing that is trained on; training skips them",
    ]
    assert len(IndexedDataset(tmp_path / "noted")) == len(records)
    assert notes(tmp_path, records[:1], capsys) == ["1 turn is not trained on"]
    assert notes(tmp_path, records[2:3], capsys)[1] == "1 turn has another weight than 1"


def test_placeholders_are_noted(tmp_path: Path, capsys) -> None:
    chat = {
        "messages": [{"role": "user", "content": "I am {{ name }}"}, {"role": "assistant", "content": "{{a}}{{a}}"}]
    }
    preference = {"prompt": "q", "chosen": "{{作者}}", "rejected": "{{a}} {{1}} {{ a b }} {x} {{}}"}
    assert notes(tmp_path, [chat, preference, {"text": "{{a}}"}], capsys) == [
        "placeholders stand in the text and are trained on as they are: {{a}} (3), {{ name }} (1), {{作者}} (1); "
        "replace them first, if they are to be filled in"
    ]


def test_notes_are_the_same_with_several_processes(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from fm9g.data.prepare import index_builder

    records = [{"text": "{{a}}", "id": n, "train": n % 3 != 0} for n in range(50)]
    expected = notes(tmp_path, records, capsys)
    assert len(expected) == 4
    monkeypatch.setattr(index_builder, "_CHUNK_BYTES", 101)
    assert notes(tmp_path, records, capsys, "--workers", "2") == expected


def test_notes_of_real_files(tmp_path: Path, shared: Path, capsys) -> None:
    found = {}
    for name in ("identity", "glaive_toolcall_zh_demo"):
        arguments = ["--language", "zh", "--output", str(tmp_path / name)]
        assert main(["data", "index", "--path", str(shared / "data" / f"{name}.json"), *arguments]) == 0
        found[name] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    (note,) = found["identity"]
    assert note.startswith("note: placeholders stand in the text and are trained on as they are: {{name}} (")
    assert found["glaive_toolcall_zh_demo"] == ["note: of the records, 200 have tools or calls"]


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
    assert "note: 2 records are not in zh and were left out" in capsys.readouterr().out
    assert read(tmp_path / "zh") == [records[1], records[2], chat]
    assert main([*command, "en", "--output", str(tmp_path / "en")]) == 0
    assert read(tmp_path / "en") == [records[3]]
    assert main([*command, "en", "--output", str(tmp_path / "as is"), "--as-is"]) == 2
    assert "does not go with --as-is" in capsys.readouterr().err
    write_jsonl(source, records[:1])
    assert main([*command, "zh", "--output", str(tmp_path / "none")]) == 2
    assert "language-filter: none of 1 records is in zh" in capsys.readouterr().err


def test_a_tokenizer_is_not_trained_on_ids(tmp_path: Path) -> None:
    from fm9g.data.prepare.index_builder import iter_texts
    from fm9g.data.prepare.sources import find_sources

    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "t", "weight": 0},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    assert list(iter_texts(find_sources([str(source)]))) == ["f", "y", "t", "3"]


_MANY_FILES = """
import os, resource, sys
from pathlib import Path
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.errors import UserError

folders = sorted(Path(sys.argv[1]).iterdir())
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
datasets = [IndexedDataset(folder) for folder in folders]
for dataset in datasets * 2:
    assert dataset[1]["output"] == "2"
print(len(datasets), len(os.listdir("/proc/self/fd")) < 40)
del dataset, datasets
print(len(os.listdir("/proc/self/fd")) < 8)
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    IndexedDataset(folders[0])
except UserError as error:
    print(error)
"""


def test_there_may_be_more_datasets_than_open_files(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [{"input": "", "output": str(i)} for i in (1, 2)])
    index_dataset(source, tmp_path / "dataset", "en")
    (tmp_path / "many").mkdir()
    for number in range(100):
        (tmp_path / "many" / str(number)).symlink_to(tmp_path / "dataset")
    words = [sys.executable, "-c", _MANY_FILES, str(tmp_path / "many")]
    done = subprocess.run(words, capture_output=True, encoding="utf-8")
    assert done.stderr == ""
    counted, closed, message = done.stdout.splitlines()
    assert (counted, closed) == ("100 True", "True")
    assert "a process may have 64 files open here" in message
    assert "`ulimit -n 65536`" in message
    assert "index it again" not in message


def test_a_dataset_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [{"input": "", "output": "a"}])
    index_dataset(source, tmp_path / "dataset", "en")
    dataset = IndexedDataset(tmp_path / "dataset")
    index_dataset(source, tmp_path / "dataset", "en", overwrite=True)
    with pytest.raises(UserError, match="was changed or replaced while it was read"):
        dataset[0]
