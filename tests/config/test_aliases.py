"""Former names of keys and values are read wherever a key is; dashes and underscores are the same on a command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.common import ROOT
from helpers.train_config import load_train

from fm9g.cli import main
from fm9g.config.fields import aliases_of, keys_of
from fm9g.config.mixture import DatasetConfig, load_mixture, resolve_mixture
from fm9g.config.run import load_run, with_current_keys
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.report.files import read_run_info

# Every alias of a training key, and a value that is not its default.
TRAIN: dict[str, Any] = {
    "load": "base.pt",
    "resume": "auto",
    "early_stop": 3,
    "max_bad_steps": 7,
    "spike": 2.5,
    "grad_accum": 4,
    "global_batch": 8,
    "template": "chatml",
    "template_date": "2026-07-26",
    "loss": "Last",
    "token_cache": "cache",
    "data_changes": "carry",
    "optimizer_offload": True,
}
VALUES = {"data_changes": "allow", "loss": "last"}  # those that are spelled otherwise now
DATASET = {"template": "chatml", "loss": "last"}
NEEDED = {"early_stop": {"val_dataset": "v"}}


def in_a_file(tmp_path: Path, values: dict[str, Any]) -> tuple[str, dict, dict]:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({"pretrain": {"config": str(ROOT / "model_configs" / "tiny.json"), **values}}))
    return str(file), {}, {}


def on_the_command_line(_: Path, values: dict[str, Any]) -> tuple[str, dict, dict]:
    return str(ROOT / "model_configs" / "tiny.json"), {key: str(value) for key, value in values.items()}, {}


def in_a_launch_script(_: Path, values: dict[str, Any]) -> tuple[str, dict, dict]:
    return str(ROOT / "model_configs" / "tiny.json"), {}, {key: str(value) for key, value in values.items()}


def test_the_table_above_is_complete() -> None:
    assert aliases_of(TrainConfig).keys() == TRAIN.keys()
    assert aliases_of(DatasetConfig).keys() == DATASET.keys()
    for cls in (TrainConfig, DatasetConfig):
        assert not aliases_of(cls).keys() & keys_of(cls).keys()


@pytest.mark.parametrize("write_alias", [in_a_file, on_the_command_line, in_a_launch_script])
@pytest.mark.parametrize("alias", TRAIN)
def test_a_training_key_has_its_former_name(tmp_path: Path, alias: str, write_alias: Callable) -> None:
    key, needed = aliases_of(TrainConfig)[alias], NEEDED.get(alias, {})
    loaded = load_train(*write_alias(tmp_path, {alias: TRAIN[alias], **needed}))[0]
    assert getattr(loaded.value, key) == VALUES.get(alias, TRAIN[alias]) != keys_of(TrainConfig)[key].default
    assert loaded == load_train(*write_alias(tmp_path, {key: TRAIN[alias], **needed}))[0]
    with pytest.raises(UserError, match=f"({alias} and {key}|{key} and {alias}) are both given; they are the same"):
        load_train(*write_alias(tmp_path, {alias: TRAIN[alias], key: TRAIN[alias], **needed}))


def test_the_later_source_wins_under_whichever_name(tmp_path: Path) -> None:
    name, _, _ = in_a_file(tmp_path, {"grad_accum": 4})
    assert load_train(name, {"gradient_accumulation_steps": "2"})[0].value.gradient_accumulation_steps == 2
    name, _, _ = in_a_file(tmp_path, {"gradient_accumulation_steps": 4})
    assert load_train(name, {"grad_accum": "2"})[0].value.gradient_accumulation_steps == 2
    loaded, _ = load_train(name, {}, {"grad_accum": "2", "data_changes": "carry"})
    assert loaded.notes == (f"{name} overrides the launch script: gradient_accumulation_steps is 4, not '2'",)


@pytest.mark.parametrize("alias", DATASET)
def test_a_key_of_a_dataset_has_its_former_name(tmp_path: Path, alias: str) -> None:
    key, file = aliases_of(DatasetConfig)[alias], tmp_path / "m.json"
    entry = {"task_name": "my-task", "path": "x"}
    file.write_text(json.dumps([{**entry, alias: DATASET[alias]}]))
    assert getattr(load_mixture(file)[0], key) == DATASET[alias]
    assert getattr(resolve_mixture(file, {"my-task": {key: "none" if key != "train_on" else "all"}})[0].value, key) in (
        "none",
        "all",
    )
    file.write_text(json.dumps([{**entry, alias: DATASET[alias], key: DATASET[alias]}]))
    with pytest.raises(UserError, match=f"{alias} and {key} are both given; they are the same"):
        load_mixture(file)
    file.write_text(json.dumps([entry]))
    given = {"dataset_config": str(file), "tokenizer_path": "t", f"data.my-task.{alias}": DATASET[alias]}
    assert getattr(load_run(str(ROOT / "model_configs" / "tiny.json"), given).mixture[0], key) == DATASET[alias]


def with_former_keys(config: dict[str, Any]) -> dict[str, Any]:
    """RunConfig.to_json as it was written before keys got the names that they have now."""
    former = {}
    for section, items in config.items():
        cls = {"train": TrainConfig}.get(section, DatasetConfig)
        names = {} if section == "model" else {key: alias for alias, key in aliases_of(cls).items()}
        names = {key: alias for key, alias in names.items() if alias not in ("load", "resume")}
        former[section] = {names.get(key, key): item for key, item in items.items()}
    return former


def test_what_a_run_wrote_is_read_by_present_names(tmp_path: Path) -> None:
    mixture = tmp_path / "m.json"
    mixture.write_text('[{"task_name": "a", "path": "x", "loss": "all"}]')
    given = {"dataset_config": str(mixture), "tokenizer_path": "t", "grad_accum": "3", "data_changes": "carry"}
    config = load_run(str(ROOT / "model_configs" / "tiny.json"), given).to_json()
    former = json.loads(json.dumps(with_former_keys(config)))
    former["train"]["data_changes"]["value"] = "carry"
    assert former["train"]["grad_accum"]["value"] == 3
    assert former["data.a"]["loss"]["value"] == "all"
    assert with_current_keys(former) == config
    assert with_current_keys({"train": {"lr": 1}, "other": []}) == {"train": {"lr": 1}, "other": []}
    (tmp_path / "run.json").write_text(json.dumps({"config": former}))
    assert read_run_info(tmp_path / "run.json")["config"] == config


def run(words: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    try:
        status = main(shlex.split(words))
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_dashes_and_underscores_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.json").write_text('[{"task_name": "my-task_1", "path": "x"}]')
    words = "config show --config tiny --dataset-config ./m.json --tokenizer_path=a-b --grad-accum 3"
    words += " --model.rope-theta 5 --model.qk-norm=true --data.my-task_1.max-samples 4 --default.save-iters 9"
    status, text = run(words.replace("--model.rope-theta 5 ", ""), capsys)
    lines = [line.split() for line in text.splitlines()]
    assert status == 0, text
    for line in ("tokenizer_path 'a-b'", "gradient_accumulation_steps 3", "qk_norm True", "save_iters 9"):
        assert any(found[:2] == line.split() for found in lines), line
    assert [found[1] for found in lines if found[:1] == ["max_samples"]] == ["0", "4"]
    for twice in ("--grad-accum 1 --grad_accum 2", "--grad_accum 1 --gradient-accumulation-steps 2"):
        status, text = run(f"config show --config tiny {twice}", capsys)
        assert status == 2
        assert "is given twice" in text or "are both given; they are the same" in text
    # Options of argparse, those of a run among them.
    assert "--node-rank: found 5, expected 0 to 1" in run("doctor --nodes 2 --node_rank 5", capsys)[1]
    assert "nproc" in run("train --config tiny --dataset_config ./m.json --tokenizer_path t --nproc 0", capsys)[1]
    status, text = run("data check ./nothing.json --tokenizer t --max-length 64 --chat-template-date x", capsys)
    assert (status, "chat_template_date: found 'x'" in text) == (2, True), text
    status, text = run("data check ./nothing.json --tokenizer t --loss all --train-on all", capsys)
    assert (status, "--loss and --train_on are both given; they are the same" in text) == (2, True), text
    status, text = run("data show ./nothing.json --tokenizer t --batch-size 1 --batch_size 1", capsys)
    assert (status, "argument --batch_size: is given twice" in text) == (2, True), text
