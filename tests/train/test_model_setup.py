"""What a model gets before its first step: its learning rates."""

import pytest
from helpers.common import small_model

from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.train.model_setup import setup_model_and_optimizer

SCALED = {"scale": True, "base_hidden_size": 8}  # the width is 32


def lr_scales(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The factors on the learning rate, by weight."""
    seen: list[OptimizerConfig] = []
    monkeypatch.setattr(
        FSDPEngine,
        "prepare",
        lambda self, model, layers, init_weight, optimizer_config, *_: seen.append(optimizer_config),
    )
    with DistContext("cpu") as dist_context:
        setup_model_and_optimizer(FSDPEngine(dist_context, seed=0), TrainConfig(config="x"), config, None)
    return seen[0].lr_scales


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
