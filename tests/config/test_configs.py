"""Configuration files and the command line: precedence, origins, and one clear message for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT

from fm9g.config.fields import aliases_of, keys_of
from fm9g.config.load import bare_name, require_config
from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.config.model import DEPRECATED_KEYS as DEPRECATED_MODEL_KEYS
from fm9g.config.model import ModelConfig, load_model_config, resolve_model_config
from fm9g.config.run import load_run
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig
from fm9g.config.train_file import load_adapter_keys, load_train_config
from fm9g.errors import UserError
from fm9g.io.json_file import read_json

GUIDE = """
pretrained_model resume_ckpt tokenizer_path dataset_config model_unique config n_gpus flash max_length local
dataloader save load_grad grad_ckpt_num exp_group ignore_cuda_oom tensorboard_all_tasks stop_when_end
only_run_dataloader eps inspect_iters strict_state_dict resume_no_optimze tp_size async_save batch_size save_iters
train_iters dataloader_num_threads dataloader_prefetch dataloader_prefetch_factor dataloader_num_workers
parallel_load_datastate lr warmup_iters drop_iters only_load_model lr_scheduler load_dataloader_ckpt drop_begin
drop_rate use_checkpoint
""".split()  # noqa: SIM905


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return require_config("model_configs", "tiny")


@pytest.mark.parametrize(
    ("name", "billions"), [("tiny", 0.0105), ("2b", 2.725), ("4b", 4.130), ("7b", 7.669), ("8b", 8.765), ("70b", 80.81)]
)
def test_every_shipped_size_builds_with_its_parameter_count(name: str, billions: float) -> None:
    import torch

    from fm9g.model.transformer import FM9G

    config = load_model_config(require_config("model_configs", name))
    with torch.device("meta"):
        count = sum(weight.numel() for weight in FM9G(config).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=1e-3 if name != "tiny" else 0.01)


def test_a_misspelt_key_is_named_with_file_and_nearest_key(tmp_path: Path, model_file: Path) -> None:
    values = read_json(model_file)
    values["num_layer"] = values.pop("num_layers")
    path = write(tmp_path / "wrong.json", values)
    with pytest.raises(UserError) as error:
        load_model_config(path)
    assert f"{path}: num_layer: unknown key; did you mean 'num_layers'?" in str(error.value)
    assert "num_layers: missing" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_layers", "four", "found 'four', allowed: integer >= 1"),
        ("dim_model", 0, "found 0, allowed: integer >= 1"),
        ("activate_fn", "sillu", "did you mean 'silu'?"),
        ("ffn_gated", False, "found False, allowed: True"),
        ("flash_attn_mask_shape", "3d", "allowed: '1d' or '2d'"),
        ("rope_scaling_type", "yarm", "did you mean 'yarn'?"),
        ("half_type", "int8", "one of 'bf16', 'fp16', 'fp32'"),
        ("num_kv_heads", 3, "num_heads 8 is not a multiple of num_kv_heads 3"),
    ],
)
def test_wrong_values_of_a_model_are_refused(
    tmp_path: Path, model_file: Path, key: str, value: object, expected: str
) -> None:
    path = write(tmp_path / "wrong.json", {**read_json(model_file), key: value})
    with pytest.raises(UserError) as error:
        load_model_config(path)
    assert str(path) in str(error.value)
    assert key in str(error.value)
    assert expected in str(error.value)


def test_a_model_configuration_survives_a_round_trip(tmp_path: Path, model_file: Path) -> None:
    config = load_model_config(model_file)
    again = resolve_model_config(write(tmp_path / "again.json", config.to_json()))
    assert (again.value, again.notes) == (config, ())


def test_the_other_spelling_of_the_original_length_is_read(tmp_path: Path, model_file: Path) -> None:
    path = write(tmp_path / "old.json", {**read_json(model_file), "ori_max_length": 512})
    assert load_model_config(path).orig_max_length == 512


def test_not_json_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{\n  "vocab_size": 5,\n  oops\n}')
    with pytest.raises(UserError, match=r"broken.json, line 3, column 3: not JSON"):
        load_model_config(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{"vocab_size": 5, "vocab_size": 6}')
    with pytest.raises(UserError, match="'vocab_size' is given twice"):
        load_model_config(path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"model_configs/, which has 2b, 4b, 70b, 7b, 8b, tiny; did you mean 'tiny'\?$"):
        load_train_config("tyny", {})


def test_precedence_is_defaults_then_file_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train_configs" / "mine.json", {"pretrain": {"config": "tiny", "lr": "2e-3", "train_iters": 7}})
    loaded, model = load_train_config("mine", {"train_iters": "9"})
    assert (loaded.value.lr, loaded.value.train_iters, loaded.value.eps) == (2e-3, 9, 1e-6)
    assert loaded.origins["lr"] == "train_configs/mine.json"
    assert loaded.origins["train_iters"] == "command line"
    assert loaded.origins["eps"] == "default"
    assert loaded.value.model_unique == "mine"
    assert model.name == "tiny.json"


def test_the_guides_way_of_writing_values_is_understood() -> None:
    given = {"lr_scheduler": "Cosine", "save": "False", "use_checkpoint": "1", "max_length": "4096", "lr": "1e-2"}
    config = load_train_config("tiny", given)[0].value
    assert (config.lr_scheduler, config.save, config.use_checkpoint) == ("cosine", False, True)
    assert (config.max_length, config.lr) == (4096, 0.01)


@pytest.mark.parametrize("key", GUIDE)
def test_every_parameter_of_the_guide_is_known_in_exactly_one_way(key: str) -> None:
    assert (key in keys_of(TrainConfig)) + (key in DEPRECATED_KEYS) == 1


def test_a_parameter_that_changes_nothing_says_so() -> None:
    notes = load_train_config("tiny", {"local": "False", "tp_size": "2"})[0].notes
    assert list(notes) == ["command line: local changes nothing: paths are used as they are given"]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tp_size", "0", "tp_size: found 0, allowed: integer >= 1"),
        ("zero_level", "1", "zero_level: found 1, allowed: one of 0, 2, 3"),
        ("learning_rate", "1", "learning_rate: unknown key; it is called lr here"),
        ("cutoff_len", "1", "it is called max_length here"),
        ("per_device_train_batch_size", "1", "it is called batch_size here: rows of max_length tokens"),
        ("gradient_checkpointing", "1", "write activation_checkpoint full"),
        ("packing", "1", "it is not needed here: rows are always packed"),
        ("zzz", "1", "zzz: unknown key; `fm9g config keys` lists"),
        ("lora_layer", "q_proj", "'q_proj' is not the name of a linear layer; it is called project_q here"),
        ("lora_layer", "foo,all", "'foo' is not the name of a linear layer; these are: project_q"),
        ("output_dir", "a\0b", "output_dir: found 'a\\x00b', which contains characters that are not text"),
        ("output_dir", "\ud800", "which contains characters that are not text"),
        ("n_gpus", "100000", "n_gpus: found 100000, allowed: integer >= 1 and <= 1024"),
        ("train_iter", "5", "did you mean 'train_iters'?"),
        ("batch_size", "two", "batch_size: found 'two', allowed: integer >= 1"),
        ("lr_scheduler", "cosin", "did you mean 'cosine'?"),
        ("lr", "-1", "lr: found -1"),
        ("resume_ckpt", "newest", "expected the number of a step"),
    ],
)
def test_wrong_values_on_the_command_line_are_refused(key: str, value: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_train_config("tiny", {key: value})
    assert "command line" in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize("cls", [TrainConfig, ModelConfig, DatasetConfig])
def test_what_other_tools_call_a_key_leads_to_a_key(cls: type) -> None:
    known = {f"model.{key}" for key in keys_of(ModelConfig)} | keys_of(cls).keys() | {"nothing"}
    for theirs, ours in cls.FOREIGN_KEYS.items():
        assert theirs not in {*keys_of(cls), *aliases_of(cls)}
        assert re.split(r"[ :,]", ours)[0] in known, theirs


def test_names_may_have_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model_configs" / "2.4b.json", read_json(ROOT / "model_configs" / "tiny.json"))
    write(tmp_path / "train_configs" / "2.4b.json", {"pretrain": {"lr": 0.5}})
    write(tmp_path / "dataset_configs" / "v1.5.json", [{"task_name": "a", "path": "x"}])
    for name in ("2.4b", "train_configs/2.4b.json"):
        run = load_run(name, {"dataset_config": "v1.5", "tokenizer_path": "t"})
        assert (run.train.config, run.train.model_unique, run.train.lr) == ("2.4b", "2.4b", 0.5)
        assert [item.task_name for item in run.mixture] == ["a"]


def test_finetune_wins_over_pretrain_and_a_lora_file_takes_the_model_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = {
        "finetune": {"lora_layer": '["project_q", "w_0"]', "lora_r": 4, "lr": 0.1},
        "pretrain": {"lr": 0.2, "pretrained_model": "m.pt"},
    }
    write(tmp_path / "train_configs" / "7b_lora.json", sections)
    train, model = load_train_config("7b_lora", {})
    assert (train.value.lora_layer, train.value.lr) == (["project_q", "w_0"], 0.1)
    assert (train.value.model_unique, model.name) == ("7b_lora", "7b.json")
    adapters = load_adapter_keys(tmp_path / "train_configs" / "7b_lora.json")
    assert (adapters.lora_layer, adapters.lora_r, adapters.lr) == (["project_q", "w_0"], 4, 1e-2)
    for wrong in ({"pretrain": {}, "train": {}}, {"finetune": 1}, {}):
        write(tmp_path / "train_configs" / "7b_lora.json", wrong)
        with pytest.raises(UserError, match=r"7b_lora\.json: (train|finetune|is empty)"):
            load_train_config("7b_lora", {})


def test_a_default_of_the_command_line_yields_to_the_file_which_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train_configs" / "tiny.json", {"pretrain": {"lr": 1e-4, "lr_scheduler": "Cosine"}})
    given = {"lr": "1e-2", "eps": "1e-5", "lr_scheduler": "cosine", "local": "False"}
    train, _ = load_train_config("tiny", {"train_iters": "3"}, {**given, "train_iters": "2"})
    assert (train.value.lr, train.value.eps, train.value.train_iters) == (1e-4, 1e-5, 3)
    assert train.notes == (
        "launch script (--default.): local changes nothing: paths are used as they are given",
        "train_configs/tiny.json overrides the launch script: lr is 0.0001, not '1e-2'",
    )


def test_a_default_is_no_configuration_and_a_name_no_empty_one() -> None:
    with pytest.raises(UserError, match=r"--default.config: give it as --config"):
        load_train_config("tiny", {}, {"config": "2b"})
    for name in ("", ".", "/"):
        with pytest.raises(UserError, match="--config: found"):
            load_train_config(name, {})


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
        load_train_config("tiny", {})


def test_the_guide_also_calls_pretrained_model_load() -> None:
    assert load_train_config("tiny", {"load": "7b.pt"})[0].value.pretrained_model == "7b.pt"
    with pytest.raises(UserError, match="load and pretrained_model are both given"):
        load_train_config("tiny", {"load": "7b.pt", "pretrained_model": "7b.pt"})


@pytest.mark.parametrize("key", ["use_checkpoint", "activation_checkpoint"])
def test_a_models_use_checkpoint_acts_where_the_run_says_nothing(tmp_path: Path, model_file: Path, key: str) -> None:
    path = write(tmp_path / "m.json", {**read_json(model_file), "use_checkpoint": True})
    assert load_run(str(path), {}, complete=False).train.checkpointing == "full"
    said = {"use_checkpoint": "0", "activation_checkpoint": "none"}[key]
    assert load_run(str(path), {key: said}, complete=False).train.checkpointing == "none"


def test_a_model_folder_as_configuration_is_told_what_to_do(tmp_path: Path) -> None:
    write(tmp_path / "qwen" / "config.json", {})
    with pytest.raises(UserError, match=r"`fm9g convert .*qwen qwen.pt`.*--config qwen.json"):
        load_train_config(str(tmp_path / "qwen"), {})


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


def test_paths_of_a_mixture_may_be_relative_to_where_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = tmp_path / "apps" / "fm9g_7b"
    entry = {"task_name": "a", "path": "../../data_test/a", "transforms": "./t.py"}
    mixture = write(app / "dataset_configs" / "m.json", [entry])
    (tmp_path / "data_test" / "a").mkdir(parents=True)
    (mixture.parent / "t.py").touch()
    monkeypatch.chdir(app)
    (item,) = load_mixture(mixture)
    assert (item.path, item.transforms) == (str(tmp_path / "data_test" / "a"), str(mixture.parent / "t.py"))
    (tmp_path / "apps" / "data_test" / "a").mkdir(parents=True)  # relative to the file, which comes first
    assert load_mixture(mixture)[0].path == str(tmp_path / "apps" / "data_test" / "a")


def test_mixture_keys_are_checked_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    entry = {"task_name": "a", "path": "sets/a", "transforms": "t.py"}
    (item,) = load_mixture(write(tmp_path / "m.json", [entry]))
    assert item.path == str(tmp_path / "sets/a")
    assert item.transforms == str(tmp_path / "t.py")
    for wrong, expected in [
        ([{**entry, "abs_wieght": 1}], r"\[0\].abs_wieght: unknown key; did you mean 'abs_weight'"),
        ([{"path": "x"}], r"\[0\].task_name: missing"),
        ([{**entry, "oversize_rule": "cut"}], "oversize_rule: found 'cut'"),
        ([entry, entry], "task_name 'a' is used 2 times"),
        ([{**entry, "abs_weight": 0}], "every weight is 0"),
        ([{**entry, "abs_weight": 1}, {**entry, "task_name": "b"}], "abs_weight is missing for b"),
        ({}, "expected a list"),
        ([3], r"\[0\]: found 3"),
    ]:
        with pytest.raises(UserError, match=expected):
            load_mixture(write(tmp_path / "m.json", wrong))


def test_overrides_reach_the_model_and_the_mixture(tmp_path: Path) -> None:
    mixture = write(tmp_path / "m.json", [{"task_name": "a.b", "path": "x"}])
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


def test_model_defaults_are_derived() -> None:
    config = ModelConfig(vocab_size=8, hidden_size=64, intermediate_size=8, num_layers=1, num_heads=4)
    assert (config.num_kv_heads, config.head_dim, config.orig_max_length) == (4, 16, config.max_length)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lr", "nan", "expected a finite number"),
        ("clip_grad", "inf", "expected a finite number"),
        ("model_unique", "", "expected a plain name"),
        ("model_unique", "..", "expected a plain name"),
        ("exp_group", "a/b", "expected a plain name"),
        ("chat_template", "chatm", "'chatm': no such chat template; did you mean 'chatml'"),
        ("chat_template", "mine", r"give a file such as ./mine.jinja, or one of .*, tokenizer, none"),
        ("resume_ckpt", "²", "expected the number of a step"),
        ("resume_ckpt", "9" * 5000, "expected the number of a step"),
        ("train_iters", "9" * 40, r"train_iters: found \d+, expected a finite number up to 2\^53"),
        ("batch_size", "100000000000", "too many for a row"),
        ("seed", "99999999999", "seed: found"),
    ],
)
def test_values_that_would_do_harm_are_refused(key: str, value: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_train_config("tiny", {key: value})


def test_nan_in_a_file_and_a_deep_or_long_one_are_refused(tmp_path: Path, model_file: Path) -> None:
    values = read_json(model_file)
    with pytest.raises(UserError, match="eps: found nan, expected a finite number"):
        load_model_config(write(tmp_path / "nan.json", {**values, "eps": float("nan")}))
    for text in ("[" * 100_000, "9" * 5000):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(UserError, match=r"odd.json"):
            read_json(tmp_path / "odd.json")


def test_a_message_is_short_whatever_a_file_holds(tmp_path: Path, model_file: Path) -> None:
    values = read_json(model_file) | {"half_type": "x" * 100_000}
    values |= {f"key{n}": 0 for n in range(40)}
    with pytest.raises(UserError) as caught:
        load_model_config(write(tmp_path / "long.json", values))
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) < 1100
    assert lines[-1] == "and 36 more"
    long = UserError(f"a.json: key: found {'x' * 100_000}, allowed: 1")
    assert re.fullmatch(r"a.json: key: found x+\[[\d,]+ characters\]x+, allowed: 1", str(long))


@pytest.mark.parametrize("key", ["path", "transforms", "chat_template"])
def test_a_loop_of_links_in_a_mixture_is_a_file_that_is_not_there(key: str, tmp_path: Path) -> None:
    (tmp_path / "loop.jinja").symlink_to("loop.jinja")
    entry = {"task_name": "t", "path": "data", key: "./loop.jinja"}
    loaded = load_mixture(write(tmp_path / "mixture.json", [entry]))
    assert getattr(loaded[0], key) == str(tmp_path.resolve() / "loop.jinja")
