"""Files of model_configs/. Sizes that no model has are refused before anything of them is allocated."""

import json
import re
from pathlib import Path

import pytest
from helpers.common import small_model, write_json

from fm9g.config.load import require_config
from fm9g.config.model import ModelConfig, load_model_config, resolve_model_config
from fm9g.convert.hf_config import from_hf_config, to_hf_config
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.errors import UserError
from fm9g.io.json_file import read_json

HUGE = 10**9


@pytest.mark.parametrize("key", ["num_layers", "dim_model", "dim_ff", "num_heads", "num_kv_heads", "vocab_size"])
def test_a_size_that_no_model_has_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps(small_model().to_json() | {key: HUGE}))
    with pytest.raises(UserError, match=rf"m\.json: {key}: found {HUGE}, allowed: integer >= . and <= "):
        load_model_config(tmp_path / "m.json")


IN_HF = [
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_window_layers",
]


@pytest.mark.parametrize("key", IN_HF)
def test_a_size_that_no_model_has_is_named_in_a_config_json(key: str) -> None:
    hf = to_hf_config(small_model(qkv_bias=True), "float32", 1, 2)
    with pytest.raises(UserError, match=rf"^w: {key}: found {HUGE}, allowed: at most "):
        from_hf_config(hf | {key: HUGE, "use_sliding_window": True, "sliding_window": 8}, "w")
    with pytest.raises(UserError, match=rf"^w: {key}: found 1e\+30, allowed"):
        from_hf_config(hf | {key: 1e30}, "w")


def test_a_config_json_of_such_a_size_is_not_made_for_a_tokenizer_or_a_generation(tmp_path: Path) -> None:
    from fm9g.api import generate

    train_tokenizer(["a b"], 300, tmp_path / "t")
    hf = to_hf_config(small_model(qkv_bias=True), "float32", 1, 2) | {"num_hidden_layers": HUGE}
    (tmp_path / "t" / "config.json").write_text(json.dumps(hf))
    problem = rf"config\.json: num_hidden_layers: found {HUGE}"
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=problem):
        generate(tmp_path / "t", "a")


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
    path = write_json(tmp_path / "wrong.json", values)
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
    path = write_json(tmp_path / "wrong.json", {**read_json(model_file), key: value})
    with pytest.raises(UserError) as error:
        load_model_config(path)
    assert str(path) in str(error.value)
    assert key in str(error.value)
    assert expected in str(error.value)


def test_a_model_configuration_survives_a_round_trip(tmp_path: Path, model_file: Path) -> None:
    config = load_model_config(model_file)
    again = resolve_model_config(write_json(tmp_path / "again.json", config.to_json()))
    assert (again.value, again.notes) == (config, ())


def test_the_other_spelling_of_the_original_length_is_read(tmp_path: Path, model_file: Path) -> None:
    path = write_json(tmp_path / "old.json", {**read_json(model_file), "ori_max_length": 512})
    assert load_model_config(path).orig_max_length == 512


def test_model_defaults_are_derived() -> None:
    config = ModelConfig(vocab_size=8, hidden_size=64, intermediate_size=8, num_layers=1, num_heads=4)
    assert (config.num_kv_heads, config.head_dim, config.orig_max_length) == (4, 16, config.max_length)


def test_a_message_is_short_whatever_a_file_holds(tmp_path: Path, model_file: Path) -> None:
    values = read_json(model_file) | {"half_type": "x" * 100_000}
    values |= {f"key{n}": 0 for n in range(40)}
    with pytest.raises(UserError) as caught:
        load_model_config(write_json(tmp_path / "long.json", values))
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) < 1100
    assert lines[-1] == "and 36 more"
    long = UserError(f"a.json: key: found {'x' * 100_000}, allowed: 1")
    assert re.fullmatch(r"a.json: key: found x+\[[\d,]+ characters\]x+, allowed: 1", str(long))


def test_nan_in_a_file_and_a_deep_or_long_one_are_refused(tmp_path: Path, model_file: Path) -> None:
    values = read_json(model_file)
    with pytest.raises(UserError, match="eps: found nan, expected a finite number"):
        load_model_config(write_json(tmp_path / "nan.json", {**values, "eps": float("nan")}))
    for text in ("[" * 100_000, "9" * 5000):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(UserError, match=r"odd.json"):
            read_json(tmp_path / "odd.json")


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
