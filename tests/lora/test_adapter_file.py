"""Adapter files: what they do to a weight, their sums, and the checks of their content."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.random_adapters import LAYERS, logits, make_adapter, make_model

from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.errors import UserError
from fm9g.io.pt_file import write_weights
from fm9g.lora.adapter_file import Adapter, combine, open_adapter, save_adapter
from fm9g.lora.inject import MAGNITUDE, A, B, load_adapter_into
from fm9g.model.transformer import FM9G


def merged(model: FM9G, *adapters: Adapter) -> FM9G:
    for adapter in adapters:
        for layer in adapter.layers:
            linear = model.get_submodule(layer)
            linear.weight.data = adapter.apply(layer, linear.weight.data)  # type: ignore[union-attr, operator]
    return model


@pytest.mark.parametrize("changes", [{}, {"rslora": True}, {"dora": True}, {"scale": True}])
def test_a_merged_weight_does_what_pefts_layers_do(changes: dict) -> None:
    scaled = {"scale": True, "base_hidden_size": 16} if changes.pop("scale", False) else {}
    adapter = make_adapter(make_model(**scaled), **changes)
    adapted = make_model(**scaled)
    before = logits(adapted)
    load_adapter_into(adapted, "", adapter.config, adapter.weights)
    after = logits(merged(make_model(**scaled), adapter))
    assert (logits(adapted) - before).abs().max() > 0.05
    torch.testing.assert_close(logits(adapted), after, atol=2e-5, rtol=1e-5)


def test_combined_adapters_are_their_weighted_sum() -> None:
    one = make_adapter(make_model(), 1)
    other = make_adapter(make_model(), 2, r=2, alpha=5.0, layers=["project_q", "w_1"], rslora=True)
    both = combine([one, other], [0.7, -0.4])
    assert both.config.r == 5
    for layer in both.layers:
        zero = torch.zeros_like(make_model().get_submodule(layer).weight)
        parts = [
            share * adapter.apply(layer, zero)
            for adapter, share in ((one, 0.7), (other, -0.4))
            if layer in adapter.layers
        ]
        torch.testing.assert_close(both.apply(layer, zero), sum(parts))


def test_adapters_of_several_bases_or_of_dora_are_not_added_up() -> None:
    one, other = make_adapter(make_model(), base_sha256="1"), make_adapter(make_model(), base_sha256="2")
    with pytest.raises(UserError, match="trained on different bases"):
        combine([one, other], [1.0, 1.0])
    with pytest.raises(UserError, match="is DoRA, which cannot be added up"):
        combine([one, make_adapter(make_model(), dora=True)], [1.0, 1.0])
    with pytest.raises(UserError, match="they are of different models"):
        combine([make_adapter(make_model()), make_adapter(make_model(hidden_size=64))], [1.0, 1.0])


def test_an_adapter_comes_back_from_its_folder(tmp_path: Path) -> None:
    adapter = make_adapter(make_model(), dora=True, base="b.pt", base_sha256="0" * 64)
    save_adapter(adapter, tmp_path / "a")
    again = open_adapter(tmp_path / "a")
    assert again.config == adapter.config
    assert all(torch.equal(weight, again.weights[name]) for name, weight in adapter.weights.items())
    assert again.weights.keys() == adapter.weights.keys()


def with_modules(model: FM9G, rows: int = 320, tied: bool = False, **modules: torch.Tensor) -> Adapter:
    """An adapter with complete weights; modules: their values, else those of the model and some more rows."""
    modules = modules or {"input_embedding": model.input_embedding.weight, "lm_head": model.output_weight}
    adapter = make_adapter(model, modules_to_save=list(modules), ensure_weight_tying=tied)
    weights = {f"{name}.weight": torch.cat([w, torch.ones(rows - len(w), 32)]) for name, w in modules.items()}
    return replace(adapter, weights={**adapter.weights, **weights})


def test_complete_weights_come_back_and_must_fit_the_base(tmp_path: Path) -> None:
    model, tied = make_model(), make_model(tie_word_embeddings=True)
    shapes, of_tied = ({name: weight.shape for name, weight in m.named_parameters()} for m in (model, tied))
    adapter = with_modules(model, rows=322)
    save_adapter(adapter, tmp_path / "a")
    again = open_adapter(tmp_path / "a")
    assert again.config == adapter.config
    assert torch.equal(again.saved_modules["lm_head.weight"], adapter.weights["lm_head.weight"])
    assert (again.vocab_size(320), again.vocab_size(400), make_adapter(model).vocab_size(320)) == (322, 400, 320)
    again.check_fits(shapes, "base")
    one = {"input_embedding": tied.input_embedding.weight}
    with_modules(tied, tied=True, **one).check_fits(of_tied, "base")
    for wrong, against, message in (
        (again, of_tied, "trained apart, but base has one weight for both"),
        (with_modules(tied, **one), of_tied, "trained apart, but base has one weight for both"),
        (with_modules(tied, tied=True, **one), shapes, "are one weight, but base has two"),
        (with_modules(model, rows=322, **one), shapes, "different numbers of tokens on base"),
        (again, {**shapes, "lm_head.weight": torch.Size([400, 32])}, r"\[322, 32\], but base has \[400, 32\]"),
        (again, {**shapes, "lm_head.weight": torch.Size([320, 16])}, r"\[322, 32\], but base has \[320, 16\]"),
    ):
        with pytest.raises(UserError, match=message):
            wrong.check_fits(against, "base")
    with pytest.raises(UserError, match=r"has complete weights \(input_embedding, lm_head\), which cannot be added up"):
        combine([again, make_adapter(model)], [1.0, 1.0])


def write(adapter: Adapter, path: Path, config: dict | None = None) -> Path:
    write_weights(path, adapter.weights, adapter.weights.items())
    if config is not None:
        (path.parent / ADAPTER_CONFIG).write_text(json.dumps(config))
    return path


def test_every_key_is_used_or_refused(tmp_path: Path) -> None:
    adapter = make_adapter(make_model())
    config_json, layer = adapter.config.to_json(), adapter.layers[0]

    def refused(message: str, weights: dict, config: dict = config_json) -> None:
        with pytest.raises(UserError, match=message):
            open_adapter(write(Adapter(adapter.config, weights, tmp_path), tmp_path / "a.pt", config))

    plain = dict(adapter.weights)
    refused(r"layer.extra has no place in an adapter", {**plain, "layer.extra": torch.ones(1)})
    refused("looks like a full model's", {"input_embedding.weight": torch.ones(2, 2)})
    refused("is empty", {})
    refused(r"lora_B is missing", {name: weight for name, weight in plain.items() if name != layer + B})
    refused("expected rank 3", {**plain, layer + A: torch.ones(4, 32)})
    refused("expected rank 8", plain, {**config_json, "r": 8})
    refused("holds no adapter for w_1", plain, {**config_json, "target_modules": [*LAYERS, "w_1"]})
    refused("has no DoRA", {**plain, layer + MAGNITUDE: torch.ones(32)})
    refused("magnitude is missing", plain, {**config_json, "use_dora": True})
    refused("found int32, expected fp32, bf16 or fp16", {**plain, layer + A: plain[layer + A].int()})
    refused("found float8_e5m2, expected", {**plain, layer + A: plain[layer + A].to(torch.float8_e5m2)})
    head = {**plain, "lm_head.weight": torch.ones(320, 32)}
    refused("lm_head.weight is not in modules_to_save", head)
    saves_head = {**config_json, "modules_to_save": ["lm_head"]}
    refused("lm_head.weight is missing", plain, saves_head)
    refused("expected two dimensions", {**head, "lm_head.weight": torch.ones(3)}, saves_head)
    refused("holds NaN or infinity", {**plain, layer + A: plain[layer + A] * float("nan")})
    refused("lora_alpha: found 1e\\+300", plain, {**config_json, "lora_alpha": 1e300})
    refused("lora_alpha", plain, {**config_json, "lora_alpha": "x"})
    refused("unknown key", plain, {**config_json, "lora_beta": 1})
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config_json))
    torch.save({**plain, layer + A: torch.zeros(1).expand(3, 32)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="repeats its values"):
        open_adapter(tmp_path / "a.pt")
    torch.save({**plain, 3: torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="expected one flat dict"):
        open_adapter(tmp_path / "a.pt")


def test_r_and_alpha_come_from_the_adapter(tmp_path: Path) -> None:
    """Of an adapter of the published toolkit, from its train configuration; where both are there, they must agree."""
    adapter = make_adapter(make_model())
    file = write(adapter, tmp_path / "fm9g_live_checkpoint-10.pt")
    with pytest.raises(UserError, match=r"r and alpha are unknown, .*adapter_config.json is missing"):
        open_adapter(file)
    settings = {"lora_layer": LAYERS, "lora_r": 3, "lora_alpha": 6}
    train_config = tmp_path / "7b_lora.json"
    train_config.write_text(json.dumps({"finetune": settings}))
    assert open_adapter(file, train_config).config.scaling == 2.0
    train_config.write_text(json.dumps({"finetune": {**settings, "lora_r": 4}}))
    with pytest.raises(UserError, match="expected rank 4"):
        open_adapter(file, train_config)
    write(adapter, file, adapter.config.to_json())
    train_config.write_text(json.dumps({"finetune": {**settings, "lora_alpha": 32}}))
    with pytest.raises(UserError, match=r"7b_lora.json: is not what the adapter was trained with .*lora_alpha is 32"):
        open_adapter(file, train_config)
    train_config.write_text(json.dumps({"pretrain": {"lr": 1}}))
    with pytest.raises(UserError, match="has no lora_layer"):
        open_adapter(file, train_config)
