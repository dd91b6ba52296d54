"""Something of another kind than was meant: one message that says what it is, and what to give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import ROOT, index_dataset, make_records, small_model, write_jsonl

from fm9g.cli import main
from fm9g.path_kind import (
    ADAPTER,
    CHECKPOINT,
    DATA,
    DATASET,
    DATASET_PART,
    LOG,
    MIXTURE,
    MODEL,
    MODEL_CONFIG,
    RUN,
    RUNS,
    TOKENIZER,
    TRAIN_CONFIG,
    WEIGHTS,
    kind_of,
)


@pytest.mark.parametrize(
    "record",
    [
        {"task_name": "qa", "path": "a.png", "input": "x", "output": "y"},
        {"input": "x", "output": "y", "pretrain": True},
    ],
)
def test_records_with_keys_of_configurations_are_records(tmp_path: Path, record: dict) -> None:
    for content in (record, [record]):
        assert kind_of(write(tmp_path / "a.json", content)) == DATA


def write(file: Path, content: object = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content) if content is not None else "", encoding="utf-8")
    return file


@pytest.fixture
def things(tmp_path: Path, tokenizer_path: Path) -> dict[str, Path]:
    """Something of each kind, by the kind."""
    source = write_jsonl(tmp_path / "s.jsonl", make_records(5))
    index_dataset(source, tmp_path / "dataset", "en")
    write(tmp_path / "runs" / "m" / "4" / "manifest.json", {})
    write(tmp_path / "runs" / "m" / "12" / "manifest.json", {})
    write(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    for name in ("metrics.jsonl", "events.jsonl"):
        write(tmp_path / "log" / name)
    write(tmp_path / "hf" / "config.json", {"model_type": "llama"})
    write(tmp_path / "hf" / "model-00001-of-00002.safetensors")
    return {
        DATASET: tmp_path / "dataset",
        DATASET_PART: tmp_path / "dataset" / "meta.json",
        DATA: write(tmp_path / "alpaca.json", [{"instruction": "a", "input": "", "output": "b"}]),
        MIXTURE: write(tmp_path / "mixture.json", [{"task_name": "t", "path": "dataset"}]),
        MODEL_CONFIG: write(tmp_path / "model.json", small_model().to_json()),
        TRAIN_CONFIG: write(tmp_path / "train.json", {"pretrain": {"lr": 1e-3}}),
        CHECKPOINT: tmp_path / "runs" / "m" / "12",
        ADAPTER: tmp_path / "adapter",
        WEIGHTS: write(tmp_path / "m.pt"),
        RUN: tmp_path / "runs" / "m",
        RUNS: tmp_path / "runs",
        LOG: tmp_path / "log",
        MODEL: tmp_path / "hf",
        TOKENIZER: tokenizer_path,
    }


def test_each_kind_is_known(things: dict[str, Path], tmp_path: Path) -> None:
    assert {kind: kind_of(path) for kind, path in things.items()} == {kind: kind for kind in things}
    for unknown in (tmp_path, tmp_path / "none", write(tmp_path / "odd.json", [1]), write(tmp_path / "odd.bin")):
        assert kind_of(unknown) == ""
    half = write(tmp_path / "half.json", [{"task_nam": "t", "path": "dataset"}])  # a mixture with a slip, as likely
    assert kind_of(half) == ""
    for file in (*ROOT.glob("model_configs/*.json"), *ROOT.glob("train_configs/*.json")):
        assert kind_of(file) in (MODEL_CONFIG, TRAIN_CONFIG)


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ("convert {} out", DATASET, "dataset: found an indexed dataset, expected a Hugging Face folder"),
        ("convert {} out", RUN, "Give one of them: "),
        ("convert {} out", RUNS, "Give a checkpoint of one of them, such as "),
        ("convert {} out", ADAPTER, "`fm9g lora merge BASE "),
        ("convert {} out", MIXTURE, "mixture.json: found a mixture, expected"),
        ("convert {} out.pt", LOG, "log: found the log of a run"),
        ("generate {} --prompt a", TOKENIZER, "found a tokenizer, expected a Hugging Face folder"),
        ("data tokenizer {} --vocab_size 300 --output out", MODEL, "hf: found a Hugging Face folder, expected data"),
        ("data tokenizer {} --vocab_size 300 --output out", DATASET_PART, "Give the folder, "),
        ("data index --path {} --language en --output out", RUN, "m: found the checkpoints of a run"),
        ("data index --path {} --language en --output out", LOG, "`fm9g report "),
        ("data index --path {} --language en --output out", MIXTURE, "Training takes it as --dataset_config "),
        (
            "train --config tiny --tokenizer_path t --dataset_config {}",
            DATA,
            "found data, expected a mixture",
        ),
        ("train --config tiny --tokenizer_path t --dataset_config {}", DATA, "`fm9g data index --path "),
        ("train --config tiny --tokenizer_path t --dataset_config {}", DATA, "training takes it as --data "),
        (
            "train --config tiny --tokenizer_path t --dataset_config {}",
            DATASET,
            "A mixture in dataset_configs/ names",
        ),
        ("data show {} --tokenizer t", RUN, "found the checkpoints of a run, expected a mixture"),
        ("config show --config {}", CHECKPOINT, "found a 9G checkpoint, expected a model configuration"),
        ("config show --config {}", DATASET, "found an indexed dataset, expected a model configuration"),
        ("data show mixture.json --tokenizer {}", DATASET, "found an indexed dataset, expected a tokenizer"),
        ("ckpt verify {}", DATASET, "found an indexed dataset, expected a 9G checkpoint"),
        ("lora merge {} adapter out", RUN, "found the checkpoints of a run, expected a Hugging Face folder"),
        ("lora show {}", DATASET, "found an indexed dataset, expected an adapter"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named_with_what_to_do(
    things: dict[str, Path],
    words: str,
    kind: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if words.startswith("lora merge"):
        monkeypatch.setattr("fm9g.convert.adapters.read_adapter", lambda *_: _Adapter)
    assert main(words.format(things[kind]).split()) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message.splitlines()) == 1


class _Adapter:
    where = Path("elsewhere")


def test_a_dataset_of_a_mixture_that_is_raw_data_says_how_to_index_it(
    make_mixture: Callable[..., Path], tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mixture = make_mixture({"t": make_records(3)})
    shutil.copy(tmp_path / "t.jsonl", tmp_path / "raw.jsonl")
    write(mixture, [{"task_name": "t", "path": "raw.jsonl"}])
    assert main(["data", "show", str(mixture), "--tokenizer", str(tokenizer_path)]) == 2
    assert "raw.jsonl: found data, expected an indexed dataset. `fm9g data index --path" in capsys.readouterr().err
