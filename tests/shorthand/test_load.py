"""`fm9g train --model M --data D` as a configuration: what the model says, what the method wants, what is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.common import make_records, write_jsonl

from fm9g.api import load_run_config, train_model
from fm9g.cli import main
from fm9g.config.run import RunConfig
from fm9g.config.train_rules import LINEAR_LAYERS
from fm9g.errors import UserError
from fm9g.shorthand.load import RunArguments, load_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file of records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    write_jsonl(tmp_path / "a.jsonl", make_records(30, 1))
    return tmp_path


def load(*words: object, complete: bool = False, **arguments: Any) -> RunConfig:
    return load_run(RunArguments(words=tuple(map(str, words)), **arguments), complete, prepare_data=False)


def origin(run: RunConfig, key: str) -> str:
    return run.origins["train"][key]


def test_a_hugging_face_folder_gives_architecture_weights_and_tokenizer(here: Path, hf_folder: Path) -> None:
    run = load("--model", hf_folder, "--data", "a.jsonl")
    assert (run.model.hidden_size, run.model.qkv_bias) == (32, True)
    assert run.train.pretrained_model == run.train.tokenizer_path == str(hf_folder)
    assert origin(run, "tokenizer_path") == run.origins["model"]["dim_model"] == str(hf_folder / "config.json")
    assert (run.train.model_unique, run.train.max_length, run.train.epochs) == ("qwen-full", 128, 1.0)
    assert [dataset.task_name for dataset in run.mixture] == ["a"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", {"lr": 2e-5, "lora_layer": []}),
        ("lora", {"lr": 1e-4, "lora_layer": list(LINEAR_LAYERS), "quantization": "none"}),
        ("qlora", {"lr": 1e-4, "lora_layer": list(LINEAR_LAYERS), "quantization": "nf4"}),
        ("freeze", {"lr": 2e-5, "trainable_layers": 2}),
    ],
)
def test_a_method_brings_its_defaults_and_given_keys_win(
    here: Path, hf_folder: Path, method: str, expected: dict[str, Any]
) -> None:
    run = load("--model", hf_folder, "--data", "a.jsonl", "--method", method)
    assert {key: getattr(run.train, key) for key in expected} == expected
    assert origin(run, "lr") == f"method {method}"
    given = load("--model", hf_folder, "--data", "a.jsonl", "--method", method, "--lr", "3e-3", "--train_iters", "7")
    assert (given.train.lr, given.train.train_iters, given.train.epochs) == (3e-3, 7, 0.0)


def test_layers_of_any_family_are_known(here: Path, hf_folder: Path) -> None:
    for names, expected in (
        ("q_proj,v_proj", ["project_q", "project_v"]),
        ("W_pack", ["project_q", "project_k", "project_v"]),
        ("query_key_value,dense_4h_to_h", ["project_q", "project_k", "project_v", "w_out"]),
        ("ALL", list(LINEAR_LAYERS)),
    ):
        run = load("--model", hf_folder, "--data", "a.jsonl", "--method", "lora", "--lora_layer", names)
        assert run.train.lora_layer == expected


def test_a_run_file_is_below_the_command_line(here: Path, hf_folder: Path) -> None:
    (here / "run.yaml").write_text(
        f"model: {hf_folder}\ndata: [a.jsonl]\nmethod: lora\nlr: 1e-3\nepochs: 2\nmodel.half_type: bf16\n"
        "lora_layer: [q_proj]\nsave: no\n"
    )
    run = load("--lr", "2e-5", file="run.yaml")
    assert (run.train.lr, run.train.epochs, run.train.save) == (2e-5, 2.0, False)
    assert (origin(run, "lr"), origin(run, "epochs")) == ("command line", "run.yaml")
    assert (run.model.half_type, run.train.lora_layer) == ("bf16", ["project_q"])
    content = {"model": str(hf_folder), "data": "a.jsonl", "method": "lora", "epochs": "2"}
    (here / "run.json").write_text(json.dumps(content))
    assert load(file="run.json").train.epochs == 2.0


def test_paths_beside_the_run_file_are_found(here: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "run.yaml").write_text(f"model: {hf_folder}\ndata: a.jsonl\n")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    run = load(file="../run.yaml")
    assert run.train.data == "../a.jsonl"


def test_the_name_of_a_size_is_a_model_without_weights(here: Path) -> None:
    run = load("--model", "tiny", "--data", "a.jsonl", "--tokenizer_path", "t")
    assert (run.train.config, run.train.pretrained_model) == ("tiny", "")
    assert run.train.lr == load_run(RunArguments(config="tiny"), complete=False).train.lr
    assert origin(run, "lr").endswith("train_configs/tiny.json")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--data", "a.jsonl"), "give a model: --model DIR, or --config NAME"),
        (("--model", "qwne"), r"model: qwne: no such folder or file, and no name in model_configs/ \(.*tiny.*\)"),
        (("--model", "tinny"), "did you mean 'tiny'"),
        (("--model", "Qwen/Qwen2-7B"), "fm9g does not download. Run `hf download Qwen/Qwen2-7B"),
        (("--model", "MODEL", "--pretrained_model", "other.pt"), "model gives the weights too, keep one of them"),
        (("--model", "tiny", "--config", "2b"), r"model tiny and config 2b \(.*\) are different models"),
        (("--model", "MODEL", "--config", "tiny"), r"model .*qwen and config tiny \(.*\) are different models"),
        (("--model", "MODEL", "--method", "lroa"), "method: found 'lroa', allowed: .* did you mean 'lora'"),
        (("--model", "MODEL", "--data", "a.jsonl", "--dataset_config", "v1.5"), "data and dataset_config are both"),
        (("--model", "gguf"), "model.gguf: is a GGUF file of llama.cpp, which cannot be trained"),
        (("--model", "empty"), "has no config.json"),
        (("--model", "a.jsonl"), "found data, expected a Hugging Face folder"),
        (("--model", "adapter"), "is an adapter, and its base 'gone' is not on this machine; give --model BASE"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_says_what_to_give(
    here: Path, hf_folder: Path, words: tuple[str, ...], expected: str
) -> None:
    for name in ("gguf", "empty", "adapter"):
        (here / name).mkdir()
    (here / "gguf" / "model.gguf").touch()
    (here / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    given = [str(hf_folder) if word == "MODEL" else word for word in words]
    config = given.pop() if "--config" in given else ""
    with pytest.raises(UserError, match=expected):
        load(*[word for word in given if word != "--config"], config=config)


def test_data_is_missing_only_where_a_run_would_start(here: Path, hf_folder: Path) -> None:
    assert load("--model", hf_folder).mixture == []
    with pytest.raises(UserError, match="data: missing; give --data"):
        load("--model", hf_folder, complete=True)


def test_one_command_trains_and_its_checkpoint_is_a_model_again(
    here: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(hf_folder), "--data", "a.jsonl", "--method", "lora", "--train_iters", "2"]
    assert main([*words, "--dataloader_num_workers", "0", "--report_to", "none"]) == 0
    shown = capsys.readouterr()
    assert "model: weights of" in shown.err
    assert "(first use)" in shown.err
    adapter = here / "data" / "checkpoints" / "qwen-lora" / "2"
    again = load_run_config(model=adapter, data="a.jsonl", train_iters=4)
    assert (again.train.adapter, again.train.pretrained_model) == (str(adapter), str(hf_folder))
    assert again.train.model_unique == "qwen-lora-2-lora"
    result = train_model(again)
    assert result.step == 4
    full = train_model(model=hf_folder, data="a.jsonl", train_iters=1, model_unique="f", val_split=0.2)
    assert full.best_checkpoint == full.checkpoint
    described = load("--model", full.checkpoint, "--data", "a.jsonl")
    assert described.train.tokenizer_path.startswith(str(full.checkpoint))
    assert described.train.model_unique == "f-1-full"
