"""Entries of LLaMA-Factory's dataset_info.json."""

import json
from pathlib import Path

import pytest
from helpers.common import write_json, write_jsonl
from helpers.indexing import read_dataset

from fm9g.cli import main
from fm9g.data.prepare.column_mapping import COLUMN_NAMES, ColumnMapping
from fm9g.data.prepare.dataset_info import read_dataset_info
from fm9g.data.prepare.record_formats import canonicalize
from fm9g.errors import UserError

KNOWN_COLUMNS = f"{', '.join(COLUMN_NAMES)}, instruction, input, output, conversations, kto_tag"
KNOWN_KEYS = (
    "file_name, hf_hub_url, ms_hub_url, om_hub_url, cloud_file_name, script_url, subset, split, folder, formatting, "
    "ranking, columns, tags, num_samples"
)
REAL = {
    "alpaca_en_demo": 999,
    "alpaca_zh_demo": 1000,
    "identity": 91,
    "dpo_zh_demo": 300,
    "glaive_toolcall_zh_demo": 300,
    "kto_en_demo": 300,
}
KTO_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
REAL_ENTRIES = {  # as LLaMA-Factory has them
    "identity": {},
    "alpaca_en_demo": {},
    "alpaca_zh_demo": {},
    "glaive_toolcall_zh_demo": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "dpo_zh_demo": {
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "kto_en_demo": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": KTO_TAGS,
    },
}


def test_real_datasets_by_their_entries(shared: Path, tmp_path: Path) -> None:
    info = {name: {"file_name": str(shared / "data" / f"{name}.json"), **more} for name, more in REAL_ENTRIES.items()}
    info["c4_demo"] = {"file_name": str(shared / "data" / "c4_demo.jsonl"), "columns": {"prompt": "text"}}
    path = write_json(tmp_path / "dataset_info.json", info)
    for name, count in REAL.items():
        entry = read_dataset_info(path, name)
        assert (entry.path, entry.num_samples) == (shared / "data" / f"{name}.json", 0)
        records = json.loads((shared / "data" / f"{name}.json").read_text())
        assert len(records) == count
        for record in records:
            assert canonicalize(record, entry.columns) == ("columns", canonicalize(record)[1])
    columns = read_dataset_info(path, "c4_demo").columns
    for line in (shared / "data" / "c4_demo.jsonl").read_text().splitlines():
        assert canonicalize(json.loads(line), columns)[1] == canonicalize(json.loads(line))[1]


def test_an_entry_says_where_what_and_how_many(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    alpaca = {"prompt": "instruction", "query": "input", "response": "output"}
    path = write_json(
        tmp_path / "dataset_info.json",
        {
            "a": {"file_name": "folder", "num_samples": 5},
            "b": {"file_name": "folder", "formatting": "openai"},
            "c": {"file_name": "folder", "columns": {"prompt": "x"}},
        },
    )
    a, b, c = (read_dataset_info(path, name) for name in "abc")
    assert (a.path, a.columns, a.num_samples) == (tmp_path / "folder", ColumnMapping(alpaca), 5)
    assert (b.path, b.columns, b.num_samples) == (tmp_path / "folder", ColumnMapping({"messages": "conversations"}), 0)
    assert (c.path, c.columns, c.num_samples) == (tmp_path / "folder", ColumnMapping({"text": "x"}), 0)


def test_an_entry_on_a_hub_says_which_part_of_it(tmp_path: Path) -> None:
    entry = {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "subset": "en", "split": "test", "folder": "x", "num_samples": 3}
    read = read_dataset_info(write_json(tmp_path / "dataset_info.json", {"a": entry}), "a")
    assert (read.path, read.remotes) == (None, {"hf_hub_url": "a/b", "ms_hub_url": "c/d"})
    assert (read.subset, read.split, read.folder, read.num_samples) == ("en", "test", "x", 3)


RANKING = "expected true with the columns chosen and rejected, else false"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "found 3, expected an object"),
        (
            {"script_url": "a", "subset": "en"},
            "script_url: a script that loads data is code, which fm9g does not run; save its records as a .jsonl file, "
            "and name that with file_name in place of script_url",
        ),
        (
            {"file_name": "x.json", "colums": {}},
            f"unknown name 'colums'; did you mean 'columns'? (known: {KNOWN_KEYS})",
        ),
        ({"hf_hub_url": 3}, "hf_hub_url: found 3, expected a string that is not empty"),
        (
            {"file_name": "x.json", "subset": "en"},
            "subset: selects a part of a dataset on a hub; name that part with file_name",
        ),
        ({}, "file_name: found None, expected a file or folder in {folder}"),
        ({"file_name": "y.json"}, "file_name: found 'y.json', expected a file or folder in {folder}"),
        (
            {"file_name": "x.json", "formatting": "sharegtp"},
            "formatting: found 'sharegtp', expected sharegpt or openai with these columns",
        ),
        (
            {"file_name": "x.json", "formatting": "sharegpt", "columns": {"text": "a"}},
            "formatting: found 'sharegpt', expected alpaca with these columns",
        ),
        ({"file_name": "x.json", "ranking": True}, f"ranking: found True, {RANKING}"),
        (
            {"file_name": "x.json", "columns": {"prompt": "a", "chosen": "b", "rejected": "c"}},
            f"ranking: found None, {RANKING}",
        ),
        ({"file_name": "x.json", "num_samples": 0}, "num_samples: found 0, expected an integer from 1"),
        ({"file_name": "x.json", "num_samples": True}, "num_samples: found True, expected an integer from 1"),
        ({"file_name": "x.json", "columns": ["a"]}, "columns: found ['a'], expected an object"),
        (
            {"file_name": "x.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
            f"columns: unknown name 'images'; fm9g trains on text only (known: {KNOWN_COLUMNS})",
        ),
        (
            {"file_name": "x.json", "tags": {"user_tag": 3}},
            "tags: user_tag: found 3, expected a string that is not empty",
        ),
    ],
)
def test_a_mistake_in_an_entry_is_named(tmp_path: Path, entry: object, message: str) -> None:
    (tmp_path / "x.json").write_text("[]")
    path = write_json(tmp_path / "dataset_info.json", {"mine": entry})
    with pytest.raises(UserError) as error:
        read_dataset_info(path, "mine")
    assert str(error.value) == f"{path}: mine: {message.replace('{folder}', str(tmp_path))}"


def test_an_unknown_dataset_is_named_with_those_there(tmp_path: Path) -> None:
    path = write_json(tmp_path / "dataset_info.json", {"identity": {}, "alpaca": {}})
    with pytest.raises(UserError) as error:
        read_dataset_info(path, "identitty")
    assert str(error.value) == (
        f"{path}: datasets: unknown name 'identitty'; did you mean 'identity'? (known: identity, alpaca)"
    )


def test_a_dataset_info_of_llama_factory_is_understood(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [{"q": "a", "a": "b"}])
    info = {"mine": {"file_name": "mine.jsonl", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    path = ["--path", str(tmp_path / "dataset_info.json"), "--dataset", "mine"]
    output = tmp_path.parent / f"{tmp_path.name}-out"
    assert main(["data", "index", *path, "--language", "en", "--output", str(output)]) == 0
    assert read_dataset(output) == [{"input": "a", "output": "b"}]


def test_indexing_an_entry_says_what_its_num_samples_is_in_a_mixture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"input": "", "output": str(number)} for number in range(5)])
    info = {
        "a": {"file_name": "a.jsonl", "columns": {"prompt": "output"}, "num_samples": 2},
        "b": {"hf_hub_url": "x/b"},
    }
    write_json(tmp_path / "dataset_info.json", info)
    words = ["data", "index", "--path", str(tmp_path / "dataset_info.json"), "--language", "en"]
    output = tmp_path.parent / f"{tmp_path.name}-out"
    assert main([*words, "--dataset", "a", "--output", str(output)]) == 0
    assert len(read_dataset(output)) == 5
    assert 'in a mixture, "sample": 2 draws as many of them' in capsys.readouterr().err
    assert main([*words, "--dataset", "b", "--output", str(output)]) == 2
    assert "b: hf_hub_url: download the data first" in capsys.readouterr().err
