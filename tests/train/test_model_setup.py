"""What a model gets before its first step: its learning rates, its weight decay, and which weights are trained."""

import pytest
import torch
from helpers.common import small_model
from helpers.hf_models import HF_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from fm9g.config.adapter import AdapterConfig
from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig
from fm9g.convert.families import FAMILIES
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.lora.inject import canonical_name, inject_adapters
from fm9g.model.transformer import FM9G, is_norm_or_bias, weight_shapes
from fm9g.train.model_setup import setup_model_and_optimizer

SCALED = {"scale": True, "base_hidden_size": 8}  # the width is 32


def prepared(config: ModelConfig, monkeypatch: pytest.MonkeyPatch, **keys: object) -> tuple[FM9G, OptimizerConfig]:
    """The model and the optimizer's settings that an engine is given."""
    seen: list[tuple[FM9G, OptimizerConfig]] = []
    monkeypatch.setattr(
        FSDPEngine,
        "prepare",
        lambda self, model, layers, init_weight, optimizer_config, *_: seen.append((model, optimizer_config)),
    )
    with DistContext("cpu") as dist_context:
        train_config = TrainConfig(**{"config": "x", **keys})  # type: ignore[arg-type]
        setup_model_and_optimizer(FSDPEngine(dist_context, seed=0), train_config, config, None)
    return seen[0]


def lr_scales(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The factors on the learning rate, by weight."""
    return prepared(config, monkeypatch)[1].lr_scales


def test_linear_layers_of_scaled_models_have_their_own_learning_rate_where_mup_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fm9g")
    scales = lr_scales(small_model(**SCALED), monkeypatch)
    assert {scale for name, scale in scales.items() if "layers" in name and "norm" not in name} == {0.25}
    assert {scale for name, scale in scales.items() if "layers" not in name or "norm" in name} == {1.0}
    assert "lr of linear layers: lr / 4 (muP" in caplog.text
    caplog.clear()
    assert set(lr_scales(small_model(**SCALED, mup_lr=False), monkeypatch).values()) == {1.0}
    assert "lr of linear layers: lr (model.mup_lr is false; true divides it by 4" in caplog.text
    caplog.clear()
    assert set(lr_scales(small_model(), monkeypatch).values()) == {1.0}
    assert "mup_lr" not in caplog.text


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen2", {"qkv_bias": True}), ("qwen3", {"qk_norm": True})]
)
def test_norms_and_biases_without_decay_are_those_of_transformers(
    family: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **HF_CONFIG))
    decayed = {
        native
        for name in Trainer.get_decay_parameter_names(None, theirs)  # type: ignore[arg-type]
        for native in FAMILIES[family].names.from_hf(name)
    }
    config = small_model(**changes)
    no_decay = prepared(config, monkeypatch, decay_norm_and_bias=False)[1].no_decay
    assert weight_shapes(config).keys() - no_decay == decayed
    assert prepared(config, monkeypatch)[1].no_decay == frozenset()


def test_adapters_and_magnitudes_decay_as_in_transformers() -> None:
    with torch.device("meta"):
        model = FM9G(small_model(qkv_bias=True))
    inject_adapters(model, model.encoder.layers, AdapterConfig(r=2, alpha=4.0, layers=["project_q", "w_1"], dora=True))
    decayed = set(map(canonical_name, Trainer.get_decay_parameter_names(None, model)))  # type: ignore[arg-type]
    names = {canonical_name(name) for name, _ in model.named_parameters()}
    assert decayed == {name for name in names if not is_norm_or_bias(name)}
    assert any(name.endswith("magnitude") for name in decayed)


def test_trainable_layers_and_freeze_act_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(**keys: object) -> set[str]:
        model, _ = prepared(small_model(num_layers=3), monkeypatch, **keys)
        return {name for name, weight in model.named_parameters() if weight.requires_grad}

    everything = set(weight_shapes(small_model(num_layers=3)))
    assert trained() == everything
    assert trained(trainable_layers=2) == {name for name in everything if "layers.1." in name or "layers.2." in name}
    assert trained(trainable_layers=-1) == {name for name in everything if "layers.0." in name}
    assert trained(trainable_layers=1, freeze="*norm*") == {
        name for name in everything if "layers.2." in name and "norm" not in name
    }
