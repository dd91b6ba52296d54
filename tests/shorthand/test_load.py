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
from fm9g.shorthand.load import RunArguments, load_run, read_sources
from fm9g.shorthand.model import describe_model


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
    write_jsonl(here / "b.jsonl", make_records(3, 1))
    (here / "run.yaml").write_text(f"model: {hf_folder}\ndata: [a.jsonl#5, b.jsonl]\nval_data: b.jsonl\n")
    run = load(file="../run.yaml")
    assert (run.train.data, run.train.val_data) == ("../a.jsonl#5,../b.jsonl", "../b.jsonl")


def test_default_paths_beside_the_run_file_are_found(
    here: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "run.yaml").write_text(f"model: {hf_folder}\ndata: a.jsonl\ndefault.val_data: a.jsonl\n")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert load(file="../run.yaml").train.val_data == "../a.jsonl"


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
        (("--model", "MODEL", "--config", "nix"), "'nix' is neither a file nor a name in model_configs/"),
        (("--modle", "MODEL"), "modle: unknown key; did you mean 'model'"),
        (("--model", "MODEL/model.safetensors"), "is a file of a Hugging Face folder; give the folder, "),
        (("--model", "MODEL/config.json"), "is a file of a Hugging Face folder; give the folder, "),
        (("--model", "bare.pt"), "bare.pt: has no model configuration bare.json beside it; copy it there, or give"),
        (("--model", "link"), "link: is a symbolic link that leads nowhere; its target is nowhere"),
        (("--model", "circle"), "circle is an adapter, too; merge it"),
        (("--model", "adapter"), "is an adapter, and its base 'gone' is not on this machine; give --model BASE"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_says_what_to_give(
    here: Path, hf_folder: Path, words: tuple[str, ...], expected: str
) -> None:
    for name in ("gguf", "empty", "adapter", "circle"):
        (here / name).mkdir()
    (here / "bare.pt").touch()
    (here / "link").symlink_to("nowhere")
    (here / "circle" / "adapter_config.json").write_text('{"base_model_name_or_path": "circle"}')
    (here / "gguf" / "model.gguf").touch()
    (here / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    given = [word.replace("MODEL", str(hf_folder)) for word in words]
    config = given.pop() if "--config" in given else ""
    with pytest.raises(UserError, match=expected):
        load(*[word for word in given if word != "--config"], config=config)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.yaml", "model: [MODEL]\n", r"run.yaml: model: found \['.*'\], expected a folder or a name, as text"),
        ("run.yaml", "model: MODEL\nconfig: null\n", "run.yaml: config: found None, expected a name or a file"),
        ("run.yaml", "model: MODEL\ndata: [a.jsonl, {b: 1}]\n", "run.yaml: data: found {'b': 1}, expected files"),
        ("run.yaml", "modle: MODEL\n", "run.yaml: modle: unknown key; did you mean 'model'"),
        ("run.yaml", "", "run.yaml: is empty; expected keys and values"),
        ("run.txt", "model: MODEL\n", "run.txt: expected a run file, whose name ends in .json, .yaml, .yml"),
        ("MODEL", "", "is a folder, expected a run file; a model is given as --model"),
        ("nix", "", "found 'nix', expected --key value, or a run file first"),
    ],
)
def test_a_mistake_in_a_run_file_names_the_file(
    here: Path, hf_folder: Path, name: str, text: str, expected: str
) -> None:
    if name.startswith("run"):
        (here / name).write_text(text.replace("MODEL", str(hf_folder)))
    with pytest.raises(UserError, match=expected):
        load(file=name.replace("MODEL", str(hf_folder)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: {my: {model_id: my}}", "models: my: model_id: my is a registered name; give a path or a hub name"),
        ("models: {my: {model_id: [a]}}", r"models: my: model_id: found \['a'\], expected a text"),
        ("models: {my: {model_id: a, lora_TM: 5}}", "models: my: lora_TM: found 5, expected a text or a list"),
        ("models: {my: a}", "models: expected names with keys and values, such as my-name"),
        ("datasets: {my: {dataset_path: my}}", "datasets: my: dataset_path: my is a registered name"),
        ("datasets: {my: {dataset_path: a, tags: 5}}", "datasets: my: tags: found 5, expected keys and values"),
        ("templates: {my: {prompt: 5}}", "templates: my: prompt: found 5, expected a text or a list"),
        ("models: {1: {model_id: a}}", "model: my: no such folder or file"),
    ],
)
def test_a_mistake_in_the_registry_names_its_place(here: Path, hf_folder: Path, text: str, expected: str) -> None:
    (here / "registry.yaml").write_text(text)
    model = hf_folder if text.startswith("datasets") else "my"
    with pytest.raises(UserError, match=expected):
        load("--model", model, "--data", "my")


def test_a_registered_model_may_name_one_layer(here: Path, hf_folder: Path) -> None:
    (here / "registry.yaml").write_text(f"models: {{my: {{model_id: {hf_folder}, lora_TM: q_proj}}}}")
    assert load("--model", "my", "--data", "a.jsonl", "--method", "lora").train.lora_layer == ["project_q"]


def test_the_library_takes_a_list_of_data(here: Path, hf_folder: Path) -> None:
    write_jsonl(here / "b.jsonl", make_records(3, 1))
    run = load_run_config(model=hf_folder, data=[here / "a.jsonl", "b.jsonl"])
    assert [dataset.task_name for dataset in run.mixture] == ["a", "b"]


def test_a_model_without_tokenizer_needs_one(here: Path, hf_folder: Path) -> None:
    (here / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "bare" / name).symlink_to(hf_folder / name)
    with pytest.raises(UserError, match="tokenizer_path: missing; give --tokenizer_path"):
        load("--model", "bare", "--data", "a.jsonl", complete=True)


def test_the_base_of_an_adapter_is_found_in_the_cache_of_a_hub(
    here: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(here / "ms"))
    (here / "ms" / "models" / "org").mkdir(parents=True)
    (here / "ms" / "models" / "org" / "base").symlink_to(hf_folder)
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    described = describe_model("adapter")
    assert described.keys["pretrained_model"] == str(here / "ms" / "models" / "org" / "base")


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


def test_a_file_of_train_configs_takes_key_value_words_but_no_dialect(here: Path, hf_folder: Path) -> None:
    (here / "named.json").write_text('{"pretrain": {"lr": 0.5}}')
    given = {"file": "named.json", "words": ("lr=0.25",)}
    assert read_sources(RunArguments(**given)).sources[0].values["lr"] == "0.25"
    with pytest.raises(UserError, match=r"named\.json: is a file of fm9g; leave out --from llamafactory"):
        read_sources(RunArguments(**given, dialect="llamafactory"))
