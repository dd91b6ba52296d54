"""The datasets of a run from `data`: the same as by hand, divided and sampled exactly."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.common import assert_same_packs, index_dataset, load_steps, make_records, write_json, write_jsonl
from helpers.indexing import read_dataset

from fm9g.config.load import ConfigSource, Resolved, resolve_sources
from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.config.train import TrainConfig
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError
from fm9g.shorthand.data import RunData, resolve_data


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files of 30, 60 and 10 records."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 30), ("b", 60), ("c", 10)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_records(count, seed=count))
    return tmp_path


def resolve(
    data: str, overrides: dict[str, dict[str, Any]] | None = None, prepare: bool = True, **keys: Any
) -> RunData:
    values = {"data": data, "data_cache_dir": "cache", "output_dir": "out", **keys}
    train = resolve_sources(TrainConfig, [ConfigSource("command line", values)])
    return resolve_data(train, overrides or {}, prepare)


def records(dataset: Resolved[DatasetConfig], tokenizer_path: Path) -> list[str]:
    """The outputs of the records of a dataset as a run opens it."""
    opened = Mixture([dataset.value], str(tokenizer_path), 64, seed=0).datasets[0]
    return [opened[index]["output"] for index in range(len(opened))]


def tasks(datasets: list[Resolved[DatasetConfig]]) -> list[str]:
    return [dataset.value.task_name for dataset in datasets]


def test_the_packs_are_those_of_a_mixture_made_by_hand(here: Path, tokenizer_path: Path) -> None:
    entries = []
    for name in "ab":
        index_dataset(here / f"{name}.jsonl", here / "indexed" / name, "en")
        entries.append({"task_name": name, "path": f"indexed/{name}"})
    by_hand = load_mixture(write_json(here / "mixture.json", entries))
    found = [dataset.value for dataset in resolve("a.jsonl,b.jsonl").train]
    packs = [load_steps(Mixture(configs, str(tokenizer_path), 64, seed=3), 4)[0] for configs in (by_hand, found)]
    assert_same_packs(*packs)


def test_values_come_from_the_entry_and_the_command_line(here: Path) -> None:
    overrides = {"b": {"oversize_rule": "drop", "max_samples": "7"}}
    (a, b) = resolve("a.jsonl:0.3,b.jsonl#20:2", overrides).train
    assert (a.value.task_name, a.value.abs_weight, a.value.sample) == ("a", 0.3, 0)
    assert (b.value.abs_weight, b.value.sample, b.value.oversize_rule, b.value.max_samples) == (2.0, 20, "drop", 7)
    assert (a.origins["abs_weight"], b.origins["sample"]) == ("data (a.jsonl:0.3)", "data (b.jsonl#20:2)")
    assert b.origins["oversize_rule"] == "command line (--data.b.)"


def test_names_are_unique_and_mixtures_keep_theirs(here: Path) -> None:
    (here / "other").mkdir()
    write_jsonl(here / "other" / "a.jsonl", make_records(3))
    index_dataset(here / "c.jsonl", here / "indexed", "en")
    write_json(here / "mine.json", [{"task_name": "a", "path": "indexed"}, {"task_name": "a-2", "path": "indexed"}])
    found = resolve("a.jsonl,other/a.jsonl,mine.json,indexed", {"a-2": {"max_samples": "1"}, "a-3": {"turns": "split"}})
    assert tasks(found.train) == ["a-3", "a-4", "a", "a-2", "indexed"]
    assert [dataset.value.max_samples for dataset in found.train] == [0, 0, 0, 1, 0]
    assert found.train[0].value.turns == "split"
    assert found.train[2].origins["path"] == "mine.json"
    assert Path(found.train[4].value.path) == here / "indexed"


def test_a_sample_is_exact_and_one_beyond_the_records_repeats_them(here: Path, tokenizer_path: Path) -> None:
    (a, c) = resolve("a.jsonl#12,c.jsonl#25").train
    outputs = [record["output"] for record in make_records(30, seed=30)]
    drawn = records(a, tokenizer_path)
    assert len(set(drawn)) == 12
    assert set(drawn) < set(outputs)
    assert drawn != records(resolve("a.jsonl#12", split_seed=7).train[0], tokenizer_path)
    assert sorted(Counter(records(c, tokenizer_path)).values()) == [2] * 5 + [3] * 5


def test_val_split_divides_each_dataset(here: Path, tokenizer_path: Path) -> None:
    found = resolve("a.jsonl,b.jsonl#40,c.jsonl#25", val_split=0.2)
    assert tasks(found.train) == tasks(found.validation) == ["a", "b", "c"]
    train, validation = ([records(d, tokenizer_path) for d in part] for part in (found.train, found.validation))
    assert [*map(len, train)] == [24, 32, 20]
    assert [*map(len, validation)] == [6, 8, 2]
    assert not any(set(one) & set(other) for one, other in zip(train, validation))
    assert found.train[0].origins["sample_skip"] == "val_split (0.2)"
    other = resolve("a.jsonl", val_split=0.2, split_seed=1).validation[0]
    assert set(records(other, tokenizer_path)) != set(validation[0])


def test_train_sample_and_val_sample_are_exact_and_proportional(here: Path, tokenizer_path: Path) -> None:
    found = resolve("a.jsonl,b.jsonl,c.jsonl", val_data="b.jsonl#20", train_sample=33, val_sample=7)
    assert [len(records(dataset, tokenizer_path)) for dataset in found.train] == [10, 20, 3]
    assert [len(records(dataset, tokenizer_path)) for dataset in found.validation] == [7]
    assert tasks(resolve("a.jsonl,c.jsonl", train_sample=1).train) == ["a"]
    assert [dataset.value.sample for dataset in resolve("a.jsonl", train_sample=99).train] == [0]


def test_num_samples_of_a_dataset_info_is_a_sample(here: Path) -> None:
    columns = {"prompt": "input", "response": "output"}
    write_json(here / "dataset_info.json", {"x": {"file_name": "a.jsonl", "columns": columns, "num_samples": 4}})
    assert [dataset.value.sample for dataset in resolve("x,x#5").train] == [4, 5]


def test_without_preparation_nothing_is_written(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fm9g")
    found = resolve("a.jsonl,b.jsonl", val_split=0.2, train_sample=5, prepare=False)
    assert [dataset.value.path for dataset in found.train] == [str(here / "a.jsonl"), str(here / "b.jsonl")]
    assert caplog.messages[0] == "data: a.jsonl is not indexed yet; `fm9g train` does it"
    assert not (here / "cache").exists()
    prepared = resolve("a.jsonl", val_split=0.2)
    assert resolve("a.jsonl", val_split=0.2, prepare=False) == prepared
    assert read_dataset(Path(prepared.train[0].value.path)) == make_records(30, seed=30)


@pytest.mark.parametrize(
    ("data", "keys", "message"),
    [
        ("a.jsonl:1,b.jsonl", {}, "data: b.jsonl: has no share, and others have one; give one to all, or to none"),
        ("mine.json,a.jsonl", {}, "data: abs_weight is missing for a; give it to all datasets or to none"),
        (
            "mine.json#5",
            {},
            "data: mine.json#5: is a mixture; write sample and abs_weight for its datasets, in the file",
        ),
        ("a.jsonl", {"overrides": {"b": {}}}, "--data.b.: data has no such task_name; it has a"),
        (".", {}, "data: .: contains data_cache_dir, cache: what is written there would be read; choose another"),
        (
            ".",
            {"data_cache_dir": "/nowhere"},
            "data: .: contains output_dir, out: what is written there would be read; choose another",
        ),
        (
            "**/*.jsonl",
            {},
            "data: **/*.jsonl: contains data_cache_dir, cache: what is written there would be read; choose another",
        ),
        ("one.jsonl", {"val_split": 0.1}, "val_split: one has 1 record; it cannot be divided in two"),
        ("a.jsonl", {"val_data": "b.jsn"}, "val_data: b.jsn: no such file, folder or name; did you mean 'b.jsonl'?"),
    ],
)
def test_what_does_not_go_together_is_named(data: str, keys: dict, message: str, here: Path) -> None:
    write_jsonl(here / "one.jsonl", make_records(1))
    index_dataset(here / "c.jsonl", here / "indexed", "en")
    write_json(here / "mine.json", [{"task_name": "t", "path": "indexed", "abs_weight": 1}])
    with pytest.raises(UserError) as error:
        resolve(data, **keys)
    assert str(error.value) == message


def test_a_sample_counts_by_its_size_and_has_a_token_cache_of_its_own(here: Path, tokenizer_path: Path) -> None:
    (whole,), (sampled, b) = resolve("a.jsonl").train, resolve("a.jsonl#15,b.jsonl").train
    mixture = Mixture([sampled.value, b.value], str(tokenizer_path), 64, seed=0)
    sizes = (here / "a.jsonl").stat().st_size / 2, (here / "b.jsonl").stat().st_size
    assert mixture.proportions() == pytest.approx([size / sum(sizes) for size in sizes])
    repeated = resolve("a.jsonl#30").train[0]
    keys = [Mixture([d.value], str(tokenizer_path), 64, seed=0).cache_key(0) for d in (whole, repeated)]
    assert keys[0] != keys[1]
    assert {key for key in keys[1] if keys[0].get(key) != keys[1][key]} == {"sample"}
