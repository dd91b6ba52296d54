"""What an indexing tells about its records."""

from pathlib import Path

import pytest
from helpers.common import write_jsonl

from fm9g.cli import main
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import find_sources

PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


def notes(tmp_path: Path, records: list[dict], capsys: pytest.CaptureFixture, *options: str) -> list[str]:
    """What `fm9g data index` says of records, without the sign of a warning."""
    source = write_jsonl(tmp_path / "noted.jsonl", records)
    output = ["--output", str(tmp_path / "noted"), "--overwrite"]
    capsys.readouterr()
    assert main(["data", "index", "--path", str(source), "--language", "en", *output, *options]) == 0
    return [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()]


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
        f"1 bad records were left out; see {tmp_path / 'noted' / 'rejects.jsonl'}"
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
        "of the records, 2 have reasoning, 2 have tools or calls",
        "5 turns are not trained on, 3 have a weight other than 1",
        "2 records have nothing to train on; training skips them",
    ]
    assert len(IndexedDataset(tmp_path / "noted")) == len(records)
    assert notes(tmp_path, records[:1], capsys) == ["1 turn is not trained on"]
    assert notes(tmp_path, records[2:3], capsys)[1] == "1 turn has a weight other than 1"


def test_placeholders_are_noted(tmp_path: Path, capsys) -> None:
    chat = {
        "messages": [{"role": "user", "content": "I am {{ name }}"}, {"role": "assistant", "content": "{{a}}{{a}}"}]
    }
    preference = {"prompt": "q", "chosen": "{{作者}}", "rejected": "{{a}} {{1}} {{ a b }} {x} {{}}"}
    assert notes(tmp_path, [chat, preference, {"text": "{{a}}"}], capsys) == [
        "texts contain placeholders, which are trained on literally: {{a}} (3), {{ name }} (1), {{作者}} (1); "
        "replace them first if they are to be filled in"
    ]


def test_notes_are_the_same_with_several_processes(tmp_path: Path, capsys, caplog) -> None:
    records = [{"text": "{{a}}", "id": n, "train": n % 3 != 0} for n in range(50)]
    expected = notes(tmp_path, records, capsys)
    assert len(expected) == 4
    sources = find_sources([str(tmp_path / "noted.jsonl")])
    with caplog.at_level("INFO", "fm9g"):
        build_index(sources, tmp_path / "out", IndexConfig("en"), workers=2, chunk_bytes=101)
    assert [record.getMessage() for record in caplog.records] == expected


def test_notes_of_real_files(tmp_path: Path, shared: Path, capsys) -> None:
    found = {}
    for name in ("identity", "glaive_toolcall_zh_demo"):
        arguments = ["--language", "zh", "--output", str(tmp_path / name)]
        assert main(["data", "index", "--path", str(shared / "data" / f"{name}.json"), *arguments]) == 0
        found[name] = capsys.readouterr().err.splitlines()
    (warning,) = found["identity"]
    assert warning.startswith("warning: texts contain placeholders, which are trained on literally: {{name}} (")
    assert found["glaive_toolcall_zh_demo"] == ["of the records, 200 have tools or calls"]
