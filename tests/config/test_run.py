"""The configuration of a run, from its files and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT, write_json

from fm9g.config.load import bare_name
from fm9g.config.model import DEPRECATED_KEYS as DEPRECATED_MODEL_KEYS
from fm9g.config.run import load_run
from fm9g.errors import UserError
from fm9g.io.json_file import read_json


def test_names_may_have_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "model_configs" / "2.4b.json", read_json(ROOT / "model_configs" / "tiny.json"))
    write_json(tmp_path / "train_configs" / "2.4b.json", {"pretrain": {"lr": 0.5}})
    write_json(tmp_path / "dataset_configs" / "v1.5.json", [{"task_name": "a", "path": "x"}])
    for name in ("2.4b", "train_configs/2.4b.json"):
        run = load_run(name, {"dataset_config": "v1.5", "tokenizer_path": "t"})
        assert (run.train.config, run.train.model_unique, run.train.lr) == ("2.4b", "2.4b", 0.5)
        assert run.origins["train"]["model_unique"] == "config 2.4b"
        assert [item.task_name for item in run.mixture] == ["a"]


@pytest.mark.parametrize("key", ["use_checkpoint", "activation_checkpoint"])
def test_a_models_use_checkpoint_acts_where_the_run_says_nothing(tmp_path: Path, model_file: Path, key: str) -> None:
    path = write_json(tmp_path / "m.json", {**read_json(model_file), "use_checkpoint": True})
    assert load_run(str(path), {}, complete=False).train.checkpointing == "full"
    values = {"use_checkpoint": "0", "activation_checkpoint": "none"}[key]
    assert load_run(str(path), {key: values}, complete=False).train.checkpointing == "none"


def test_one_place_says_once_what_is_recomputed(tmp_path: Path, model_file: Path) -> None:
    both = {"use_checkpoint": "true", "activation_checkpoint": "none"}
    with pytest.raises(UserError, match="use_checkpoint true and activation_checkpoint none are both given"):
        load_run(str(model_file), both, complete=False)
    run = load_run(str(model_file), {**both, "activation_checkpoint": "full"}, complete=False)
    assert run.train.checkpointing == "full"


def published() -> list:
    folder = ROOT.parent / "shared" / "data" / "published"
    return sorted(folder.glob("*/*_configs/*.json")) or [pytest.param(None, marks=pytest.mark.skip("no ../shared"))]


@pytest.mark.parametrize(
    "file", published(), ids=lambda file: file and f"{file.parts[-3]}-{file.parts[-2]}-{file.stem}"
)
def test_every_published_file_loads(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fm9g")
    monkeypatch.chdir(file.parents[1])
    name = bare_name(file.name)
    given = {"dataset_config": str(file)} if file.parent.name == "dataset_configs" else {}
    if name.endswith("_lora"):
        given["default.pretrained_model"] = "7b.pt"
    config = "tiny" if given.get("dataset_config") else name
    run = load_run(config, given, complete=False)
    content = read_json(file)
    if file.parent.name == "model_configs":
        for key in ("flash_attn_mask_shape", "ffn_gated"):
            assert any(f"{file.parent.name}/{file.name}: {key} changes nothing" in note for note in caplog.messages)
        assert run.model.orig_max_length == content.get("ori_max_length", 8192)
        assert run.train.checkpointing == ("full" if content.get("use_checkpoint") else "none")
        acting = content.keys() - DEPRECATED_MODEL_KEYS.keys() - {"architectures", "ori_max_length"}
        assert {key: run.model.to_json()[key] for key in acting} == {key: content[key] for key in acting}
    elif file.parent.name == "train_configs":
        for key, value in {**content["pretrain"], **content.get("finetune", {})}.items():
            assert getattr(run.train, key) == (json.loads(value) if key == "lora_layer" else value)
    else:
        assert [item.task_name for item in run.mixture] == [entry["task_name"] for entry in content]


def test_overrides_reach_the_model_and_the_mixture(tmp_path: Path) -> None:
    mixture = write_json(tmp_path / "m.json", [{"task_name": "a.b", "path": "x"}])
    given = {"dataset_config": str(mixture), "tokenizer_path": "t", "model.num_layers": "9", "data.a.b.weight": "0.5"}
    run = load_run("tiny", given)
    assert run.model.num_layers == 9
    assert run.mixture[0].weight == 0.5
    assert run.to_json()["model"]["num_layers"]["from"] == "command line (--model.)"
    with pytest.raises(UserError, match="has no such task_name"):
        load_run("tiny", {**given, "data.c.weight": "1"})


def test_configuration_does_not_import_torch() -> None:
    code = (
        "import sys, fm9g.config.run, fm9g.data.load.indexed_dataset, fm9g.data.prepare.index_builder; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
