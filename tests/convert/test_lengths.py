"""Rotary positions and sliding windows of foreign folders, at lengths below, at and beyond those where they change."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.common import make_batch, small_model
from helpers.hf_models import HF_CONFIG, make_hf_model

from fm9g.config.model import ModelConfig
from fm9g.convert.hf_config import from_hf_config, native_model_type, to_hf_config
from fm9g.convert.hf_export import export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.convert.hf_reader import open_hf_folder
from fm9g.errors import UserError
from fm9g.io.json_file import read_object
from fm9g.model import attention
from fm9g.model.transformer import FM9G

ORIGINAL = 16
LENGTHS = [5, ORIGINAL, ORIGINAL + 1, 40, 90]  # in this order transformers' dynamic rope never looks back
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"type": "dynamic", "factor": 3.0}
ROPES: dict[str, dict] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear, rope_theta inside": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "plain, rope_theta inside": {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope_scaling before rope_parameters": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    },
    "dynamic": {"rope_scaling": DYNAMIC, "max_position_embeddings": ORIGINAL},
    "dynamic with an original length": {
        "rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 8},
        "max_position_embeddings": ORIGINAL,
    },
    "dynamic with an original length beside it": {
        "rope_scaling": DYNAMIC,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": ORIGINAL,
    },
    "yarn": {"rope_scaling": YARN},
    "yarn with an original length beside it": {"rope_scaling": YARN, "original_max_position_embeddings": 24},
    "yarn with nothing but a factor": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn by two lengths": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, attention_factor": {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    "yarn without sharper attention": {"rope_scaling": {**YARN, "attention_factor": 1.0}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn, equal mscales": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    "yarn, borders": {"rope_scaling": {**YARN, "beta_fast": 0.5, "beta_slow": 0.1}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3 with an original length beside it": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 48},
}
WINDOW = 12
KINDS = {"sliding_window": WINDOW, "use_sliding_window": True}
MIXED = ["full_attention", "sliding_attention"]
WINDOWS: dict[str, tuple[str, dict, list[int]]] = {  # the class, its configuration, the windows of its two layers
    "mistral": ("mistral", {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    "mistral beyond its positions": ("mistral", {"sliding_window": 500}, [500, 500]),
    "qwen2": ("qwen2", {**KINDS, "max_window_layers": 1}, [0, WINDOW]),
    "qwen2, all layers": ("qwen2", {**KINDS, "max_window_layers": 0}, [WINDOW, WINDOW]),
    "qwen2, no layer": ("qwen2", {**KINDS, "max_window_layers": 2}, [0, 0]),
    "qwen2, not used": ("qwen2", {**KINDS, "use_sliding_window": False, "max_window_layers": 0}, [0, 0]),
    "qwen3": ("qwen3", {**KINDS, "layer_types": MIXED, "max_window_layers": 0}, [0, WINDOW]),
    "qwen3, the first": ("qwen3", {**KINDS, "layer_types": MIXED[::-1]}, [WINDOW, 0]),
}


def assert_same_logits(folder: Path, reference: torch.nn.Module) -> ModelConfig:
    """Compares documents of all lengths: one at a time in transformers, packed into one row in ours."""
    config, weights = open_hf_folder(folder)
    model = FM9G(config)
    model.load_state_dict({name: weight.read() for name, weight in weights.items()})
    batch = make_batch(LENGTHS)
    with torch.no_grad():
        found = model.logits(batch).split(LENGTHS)
        expected = [reference(ids[None]).logits[0] for ids in batch.input_ids.split(LENGTHS)]
    for length, one, other in zip(LENGTHS, found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5, msg=lambda text, n=length: f"{n} tokens: {text}")
    return config


@pytest.mark.parametrize("case", ROPES)
def test_positions_turn_as_in_transformers_at_every_length(case: str, tmp_path: Path) -> None:
    reference = make_hf_model("llama", ROPES[case], tmp_path / "hf")
    config = assert_same_logits(tmp_path / "hf", reference)
    out = to_hf_config(config, "float32", None, None)
    assert from_hf_config(out, "out") == config
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    export_folder(tmp_path / "m.pt", tmp_path / "out")
    assert_same_logits(tmp_path / "out", reference)


def test_the_stretch_of_every_kind_does_something(tmp_path: Path) -> None:
    """Otherwise the comparisons above would pass for a model that ignores rope scaling."""
    make_hf_model("llama", {}, tmp_path / "hf")
    _, weights = open_hf_folder(tmp_path / "hf")
    batch, seen = make_batch(LENGTHS), []
    for case, changes in ROPES.items():
        model = FM9G(from_hf_config({**read_object(tmp_path / "hf" / "config.json"), **changes}, case))
        model.load_state_dict({name: weight.read() for name, weight in weights.items()})
        with torch.no_grad():
            seen.append((case, model.logits(batch)))
    alike = [
        {one, other}
        for place, (one, logits) in enumerate(seen)
        for other, others in seen[:place]
        if float((logits - others).abs().max()) < 1e-4
    ]
    assert alike == [
        {"dynamic", "dynamic with an original length"},
        {"dynamic", "dynamic with an original length beside it"},
        {"dynamic with an original length", "dynamic with an original length beside it"},
        {"yarn without sharper attention", "yarn, equal mscales"},
    ]


@pytest.mark.parametrize("block", [1024, 7])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_slide_as_in_transformers_at_every_length(
    case: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_document = functools.partial(attention.attention_by_document, query_chunk=block)
    monkeypatch.setattr(attention, "attention_by_document", by_document)
    kind, changes, windows = WINDOWS[case]
    reference = make_hf_model(kind, changes, tmp_path / "hf")
    config = assert_same_logits(tmp_path / "hf", reference)
    assert list(config.windows) == windows
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    export_folder(tmp_path / "m.pt", tmp_path / "out", tmp_path / "hf")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["model_type"] == kind
    assert from_hf_config(out, "out") == config
    assert_same_logits(tmp_path / "out", reference)


def test_windows_that_no_class_has_are_not_exported() -> None:
    assert native_model_type(small_model(sliding_window=8)) == "mistral"
    with pytest.raises(UserError, match="sliding windows in some layers: no transformers class"):
        native_model_type(small_model(sliding_window=8, layer_types=MIXED))
    with pytest.raises(UserError, match="scaled arithmetic with sliding windows"):
        native_model_type(small_model(sliding_window=8, scale=True, base_hidden_size=16))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("qwen2", {"layer_types": MIXED, "sliding_window": 8}, "use_sliding_window is false or there is no window"),
        ("qwen3", {**KINDS, "layer_types": [*MIXED, MIXED[0]]}, "layer_types is not a list of 2 times"),
        (
            "qwen2",
            {**KINDS, "layer_types": ["chunked_attention", MIXED[1]]},
            "layer_types is not a list of 2 times",
        ),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "differ between layers"),
        ("llama", {"rope_scaling": {**YARN, "truncate": False}}, "9G always rounds the bounds of YaRN"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor: missing"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor: missing"),
    ],
)
def test_odd_positions_and_windows_are_refused(kind: str, changes: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        from_hf_config({**HF_CONFIG, "model_type": kind, **changes}, "config.json")


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window is neither true nor false"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0, not a number of tokens"),
        ("mistral", {"sliding_window": "16"}, "sliding_window is '16'"),
        ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"]}, "layer_types is not a list of 2 times"),
        ("mistral", {"sliding_window": 16, "layer_types": ["foo", "foo"]}, "layer_types is not a list of 2 times"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0}}, "is not above 0"),
    ],
)
def test_odd_values_are_refused_as_transformers_does(kind: str, changes: dict, expected: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(UserError, match=re.escape(expected)):
        from_hf_config({"model_type": kind, **sizes, **changes}, "config.json")


def test_the_layer_types_of_mistral_count() -> None:
    sizes = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 16}
    for kinds, windows in ((["full_attention"] * 2, (0, 0)), (["full_attention", "sliding_attention"], (0, 16))):
        assert from_hf_config({**sizes, "layer_types": kinds}, "config.json").windows == windows


def test_windows_need_their_width() -> None:
    with pytest.raises(UserError, match="layer_types has sliding_attention and sliding_window is missing"):
        small_model(layer_types=MIXED)
