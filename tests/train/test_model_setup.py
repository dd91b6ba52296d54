"""What a model is given before its first step: its learning rates, and how its work is counted."""

import numpy as np
import pytest
import torch
from helpers.common import small_model
from helpers.engine_harness import documents

from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig
from fm9g.data.load.packing import collate
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine
from fm9g.plan.sizes import attended
from fm9g.train.model_setup import setup_model_and_optimizer
from fm9g.train.timer import StepTimer

SCALED = {"scale": True, "base_hidden_size": 8}  # the width is 32


def built(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], str]:
    """The factors of the learning rate, by weight, and what the log says."""
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(
        FSDPEngine,
        "prepare",
        lambda self, model, layers, init_weight, optimizer_config, *_: seen.append(optimizer_config),
    )
    with DistContext("cpu") as dist_context:
        notes, _ = setup_model_and_optimizer(FSDPEngine(dist_context, seed=0), TrainConfig(config="x"), config, None)
    return seen[0].lr_scales, "\n".join(notes)


def test_linear_layers_of_scaled_models_have_their_own_learning_rate_where_mup_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scales, said = built(small_model(**SCALED), monkeypatch)
    assert {scale for name, scale in scales.items() if "layers" in name and "norm" not in name} == {0.25}
    assert {scale for name, scale in scales.items() if "layers" not in name or "norm" in name} == {1.0}
    assert "lr of linear layers: lr / 4 (muP" in said
    scales, said = built(small_model(**SCALED, mup_lr=False), monkeypatch)
    assert set(scales.values()) == {1.0}
    assert "lr of linear layers: lr (model.mup_lr is false; true divides it by 4" in said
    scales, said = built(small_model(), monkeypatch)
    assert set(scales.values()) == {1.0}
    assert "mup_lr" not in said


def test_work_is_counted_within_windows() -> None:
    """Against the pairs of a mask: a square counts every pair of a full layer twice, but for the diagonal."""
    for length, window in ((5, 8), (8, 8), (20, 8), (20, 1), (20, 0)):
        ages = torch.arange(length)[:, None] - torch.arange(length)
        pairs = int(((ages >= 0) & (ages < (window or length))).sum())
        assert attended([window], [length]) == pytest.approx(2 * pairs - min(length, window or length))
    assert attended((0, 8), [20]) == (20 * 20 + attended([8], [20])) / 2
    packs = [collate(group, 32) for group in documents(1)]
    lengths = np.concatenate([np.diff(pack.cu_seqlens[pack.cu_seqlens <= pack.tokens]) for pack in packs])
    for windows in ((0, 0), (0, 6), (6, 6)):
        timer = StepTimer(windows)
        timer.count(packs)
        assert timer.collect_and_reset().sum_sq_seqlens == attended(windows, lengths.tolist())
