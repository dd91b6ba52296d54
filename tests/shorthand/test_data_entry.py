"""Entries of `data`: how they are written, and what they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.common import index_dataset, write_json, write_jsonl

from fm9g.errors import UserError
from fm9g.shorthand.data_entry import LocatedData, locate, parse_entries

RECORDS = [{"input": "q", "output": "a"}]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file a.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    return tmp_path


def located(text: str) -> LocatedData:
    (entry,) = parse_entries(text, "data")
    return locate(entry)


def names_of(found: LocatedData) -> list[str]:
    """The files that are indexed, by name."""
    assert found.raw
    return [Path(source.path).name for source in found.raw.sources]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jsonl", [("a.jsonl", 0, None)]),
        ("a.jsonl#500", [("a.jsonl", 500, None)]),
        ("a.jsonl:0.3", [("a.jsonl", 0, 0.3)]),
        ("a.jsonl#5:2 , b", [("a.jsonl", 5, 2.0), ("b", 0, None)]),
        ("a.jsonl:2#5", [("a.jsonl", 5, 2.0)]),
        ("org/name:en#5", [("org/name:en", 5, None)]),
        ("HF::org/name:0.5", [("HF::org/name", 0, 0.5)]),
        ("hf://org/name", [("hf://org/name", 0, None)]),
        ("https://h:80/a.jsonl#5", [("https://h:80/a.jsonl", 5, None)]),
    ],
)
def test_a_sample_and_a_share_end_an_entry(text: str, expected: list, here: Path) -> None:
    assert [(entry.name, entry.sample, entry.share) for entry in parse_entries(text, "data")] == expected


@pytest.mark.parametrize("name", ["a#1.jsonl", "b:0.5", "c,d.jsonl", "e#5", ",f"])
def test_a_file_of_that_name_wins(name: str, here: Path) -> None:
    write_jsonl(here / name, RECORDS)
    assert [entry.name for entry in parse_entries(f"a.jsonl,{name}", "data")] == ["a.jsonl", name]
    assert [(e.name, e.sample) for e in parse_entries(f"{name}#7,a.jsonl", "data")] == [(name, 7), ("a.jsonl", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jsonl,,b", "data: entry 2 of 'a.jsonl,,b' is empty; remove a comma"),
        ("a.jsonl#0", "data: a.jsonl#0: found #0, expected a number of records from 1, such as #500"),
        ("a.jsonl#x", "data: a.jsonl#x: found #x, expected a number of records from 1, such as #500"),
        ("a.jsonl:1.5?", "data: a.jsonl:1.5?: found :1.5?, expected a share of the tokens above 0, such as :0.3"),
        ("a.jsonl:0", "data: a.jsonl:0: found :0, expected a share of the tokens above 0, such as :0.3"),
        ("a.jsonl:nan", "data: a.jsonl:nan: found :nan, expected a share of the tokens above 0, such as :0.3"),
        ("a.jsonl#3#4", "data: a.jsonl#3#4: has two samples; keep one of them"),
        ("a.jsonl:3:4", "data: a.jsonl:3:4: has two shares; keep one of them"),
        ("#5", "data: #5: names no data before its sample or share"),
    ],
)
def test_a_mistake_in_an_entry_is_named(text: str, message: str, here: Path) -> None:
    with pytest.raises(UserError) as error:
        parse_entries(text, "data")
    assert str(error.value) == message


def test_files_folders_and_globs_become_one_dataset_each(here: Path) -> None:
    folder = here / "raw"
    folder.mkdir()
    for name in ("one.jsonl", "two.jsonl.gz", "three.txt"):
        write_jsonl(folder / name, RECORDS)
    assert (located("a.jsonl").task, names_of(located("a.jsonl"))) == ("a", ["a.jsonl"])
    assert (located("raw").task, names_of(located("raw"))) == ("raw", ["one.jsonl", "three.txt", "two.jsonl.gz"])
    assert (located("raw/").task, located("raw/two.jsonl.gz").task) == ("raw", "two")
    assert (located("raw/*.jsonl").task, names_of(located("raw/*.jsonl"))) == ("raw", ["one.jsonl"])
    assert located("*.jsonl").task == "data"


def test_indexed_datasets_and_mixtures_are_used_as_they_are(here: Path) -> None:
    index_dataset(here / "a.jsonl", here / "indexed" / "train", "en")
    mixture = write_json(here / "dataset_configs" / "mine.json", [{"task_name": "t", "path": "../indexed/train"}])
    assert located("indexed/train") == LocatedData("indexed", dataset=here / "indexed" / "train")
    assert located("dataset_configs/mine.json") == LocatedData(mixture=mixture.relative_to(here))
    assert located("mine") == LocatedData(mixture=Path("dataset_configs/mine.json"))
    with pytest.raises(UserError, match="indexed: contains the datasets train; give indexed/train"):
        located("indexed")


def test_a_folder_of_save_to_disk_is_one_source(here: Path) -> None:
    (here / "saved").mkdir()
    (here / "saved" / "state.json").write_text("{}")
    found = located("saved")
    assert found.raw
    assert [source.format for source in found.raw.sources] == ["datasets"]


def test_names_of_a_dataset_info_are_found_here_in_data_and_in_their_folder(here: Path) -> None:
    (here / "data").mkdir()
    write_jsonl(here / "data" / "x.jsonl", RECORDS)
    columns = {"prompt": "input", "response": "output"}
    write_json(here / "data" / "dataset_info.json", {"x": {"file_name": "x.jsonl", "columns": columns}})
    write_json(here / "dataset_info.json", {"y": {"file_name": "a.jsonl", "num_samples": 7}})
    for text, task, file in [("x", "x", "x.jsonl"), ("data/x", "x", "x.jsonl"), ("y", "y", "a.jsonl")]:
        found = located(text)
        assert (found.task, names_of(found)) == (task, [file])
    assert located("x").raw.columns.names == columns  # type: ignore[union-attr]
    assert (located("x").sample, located("y").sample) == (0, 7)


def test_data_of_a_hub_is_found_beside_its_dataset_info_with_its_subset_and_split(here: Path) -> None:
    entries = {
        "train": {"hf_hub_url": "org/far", "subset": "en"},
        "test": {"ms_hub_url": "org/far", "subset": "en", "split": "test"},
        "all": {"hf_hub_url": "org/far", "folder": "zh"},
        "none": {"hf_hub_url": "org/far", "folder": "zh", "split": "test"},
        "no": {"hf_hub_url": "org/far", "subset": "fr"},
        "cloud": {"cloud_file_name": "s3://bucket/a.jsonl"},
    }
    write_json(here / "dataset_info.json", entries)
    for name in ("en/train-00000.jsonl", "en/test-00000.jsonl", "zh/part.jsonl"):
        (here / "far" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(here / "far" / name, RECORDS)
    for name, file in [("train", "train-00000.jsonl"), ("test", "test-00000.jsonl"), ("all", "part.jsonl")]:
        assert names_of(located(name)) == [file]
    assert names_of(located("cloud")) == ["a.jsonl"]
    with pytest.raises(UserError, match=r"none: far/zh has no files of the split 'test'; it has train"):
        located("none")
    with pytest.raises(UserError, match=r"no: far has no folder 'fr'; its folders: en, zh"):
        located("no")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b.jsonl", "data: b.jsonl: no such file, folder or name; did you mean 'a.jsonl'?"),
        ("./b.jsonl", "data: ./b.jsonl: no such file, folder or name; did you mean './a.jsonl'?"),
        ("idntity", "data: idntity: no such file, folder or name; did you mean 'identity'?"),
        ("info/idntity", "data: info/idntity: no such file, folder or name; did you mean 'info/identity'?"),
        ("info/dataset_info.json", "data: info/dataset_info.json: name the datasets in it: info/identity, info/far"),
        ("org/b.jsonl", "data: org/b.jsonl: no such file, folder or name"),
        ("*.txt", "data: *.txt: matches no file"),
        ("-", "data: -: stdin can be read once, by one process; index it with `fm9g data index --path -`"),
        ("x" * 300, f"data: {'x' * 300}: cannot be read: File name too long"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest_name(text: str, message: str, here: Path) -> None:
    entries = {"identity": {"file_name": "../a.jsonl"}, "far": {"ms_hub_url": "org/far"}}
    write_json(here / "info" / "dataset_info.json", entries)
    write_json(here / "data" / "dataset_info.json", entries)
    with pytest.raises(UserError) as error:
        located(text)
    assert str(error.value) == message


def test_data_of_a_hub_that_is_not_here_is_refused_with_what_to_write(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(here))
    write_json(here / "dataset_info.json", {"far": {"ms_hub_url": "org/far"}})
    with pytest.raises(
        UserError, match=r'then write "file_name": "far" in place of ms_hub_url in dataset_info.json: far'
    ):
        located("far")
    with pytest.raises(UserError, match=r"hf download org/name --repo-type dataset .* then give --data name"):
        located("org/name:en")
