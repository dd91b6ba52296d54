"""Files of train_configs/ and the command line: precedence, origins, and one clear message for each mistake."""

from pathlib import Path

import pytest
from helpers.common import write_json
from helpers.train_config import load_train

from fm9g.config.train_file import load_adapter_keys
from fm9g.errors import UserError


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model_configs/, which has 2b, 4b, 70b, 7b, 8b, tiny; did you mean 'tiny'\?$"):
        load_train("tyny", {})


def test_precedence_is_defaults_then_file_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(
        tmp_path / "train_configs" / "mine.json", {"pretrain": {"config": "tiny", "lr": "2e-3", "train_iters": 7}}
    )
    loaded, model = load_train("mine", {"train_iters": "9"})
    assert (loaded.value.lr, loaded.value.train_iters, loaded.value.eps) == (2e-3, 9, 1e-6)
    assert loaded.origins["lr"] == "train_configs/mine.json"
    assert loaded.origins["train_iters"] == "command line"
    assert loaded.origins["eps"] == "default"
    assert loaded.value.model_unique == "mine"
    assert model.name == "tiny.json"


def test_the_guides_way_of_writing_values_is_understood() -> None:
    given = {"lr_scheduler": "Cosine", "save": "False", "use_checkpoint": "1", "max_length": "4096", "lr": "1e-2"}
    config = load_train("tiny", given)[0].value
    assert (config.lr_scheduler, config.save, config.use_checkpoint) == ("cosine", False, True)
    assert (config.max_length, config.lr) == (4096, 0.01)


def test_a_parameter_that_changes_nothing_says_so() -> None:
    notes = load_train("tiny", {"local": "False", "tp_size": "2"})[0].notes
    assert list(notes) == ["command line: local changes nothing: paths are used as they are given"]


def test_finetune_wins_over_pretrain_and_a_lora_file_takes_the_model_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = {
        "finetune": {"lora_layer": '["project_q", "w_0"]', "lora_r": 4, "lr": 0.1},
        "pretrain": {"lr": 0.2, "pretrained_model": "m.pt"},
    }
    write_json(tmp_path / "train_configs" / "7b_lora.json", sections)
    train, model = load_train("7b_lora", {})
    assert (train.value.lora_layer, train.value.lr) == (["project_q", "w_0"], 0.1)
    assert (train.value.model_unique, model.name) == ("7b_lora", "7b.json")
    adapters = load_adapter_keys(tmp_path / "train_configs" / "7b_lora.json")
    assert (adapters.lora_layer, adapters.lora_r, adapters.lr) == (["project_q", "w_0"], 4, 1e-2)
    for wrong in ({"pretrain": {}, "train": {}}, {"finetune": 1}, {}):
        write_json(tmp_path / "train_configs" / "7b_lora.json", wrong)
        with pytest.raises(UserError, match=r"7b_lora\.json: (train|finetune|is empty)"):
            load_train("7b_lora", {})


def test_a_default_of_the_command_line_yields_to_the_file_which_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "train_configs" / "tiny.json", {"pretrain": {"lr": 1e-4, "lr_scheduler": "Cosine"}})
    given = {"lr": "1e-2", "eps": "1e-5", "lr_scheduler": "cosine", "local": "False"}
    train, _ = load_train("tiny", {"train_iters": "3"}, {**given, "train_iters": "2"})
    assert (train.value.lr, train.value.eps, train.value.train_iters) == (1e-4, 1e-5, 3)
    assert train.notes == (
        "launch script (--default.): local changes nothing: paths are used as they are given",
        "train_configs/tiny.json overrides the launch script: lr is 0.0001, not '1e-2'",
    )


def test_a_default_is_no_configuration_and_a_name_no_empty_one() -> None:
    with pytest.raises(UserError, match=r"--default.config: give it as --config"):
        load_train("tiny", {}, {"config": "2b"})
    for name in ("", ".", "/"):
        with pytest.raises(UserError, match="--config: found"):
            load_train(name, {})


@pytest.mark.parametrize("kind", ["loop", "dangling", "folder"])
def test_a_configuration_that_is_no_file_is_named_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "train_configs" / "tiny.json"
    file.parent.mkdir()
    if kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("tiny.json" if kind == "loop" else "nothing")
    with pytest.raises(UserError, match=r"train_configs/tiny.json: is not a file but"):
        load_train("tiny", {})


def test_the_guide_also_calls_pretrained_model_load() -> None:
    assert load_train("tiny", {"load": "7b.pt"})[0].value.pretrained_model == "7b.pt"
    with pytest.raises(UserError, match="load and pretrained_model are both given"):
        load_train("tiny", {"load": "7b.pt", "pretrained_model": "7b.pt"})


def test_a_model_folder_as_configuration_is_told_what_to_do(tmp_path: Path) -> None:
    write_json(tmp_path / "qwen" / "config.json", {})
    with pytest.raises(UserError, match=r"is a Hugging Face folder, not a configuration; give it as --model .*qwen"):
        load_train(str(tmp_path / "qwen"), {})
