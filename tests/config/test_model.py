"""Sizes that no model has are refused before anything of them is allocated."""

import json
from pathlib import Path

import pytest
from helpers.common import small_model

from fm9g.config.model import load_model_config
from fm9g.convert.hf_config import from_hf_config, to_hf_config
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.errors import UserError

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
    from fm9g.infer.generate import generate

    train_tokenizer(["a b"], 300, tmp_path / "t")
    hf = to_hf_config(small_model(qkv_bias=True), "float32", 1, 2) | {"num_hidden_layers": HUGE}
    (tmp_path / "t" / "config.json").write_text(json.dumps(hf))
    problem = rf"config\.json: num_hidden_layers: found {HUGE}"
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=problem):
        generate(tmp_path / "t", "a")
