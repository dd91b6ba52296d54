"""Sizes of checkpoints, beside what optimizers save."""

from dataclasses import replace

import pytest
from helpers.plan_models import SMALL, shipped

from fm9g.model.counts import count_weights, layer_weights
from fm9g.plan.estimate import estimate_job
from fm9g.plan.job import JobConfig
from fm9g.plan.render import format_table
from fm9g.plan.sizes import checkpoint_bytes


@pytest.mark.parametrize("name", ["2b", "4b", "7b", "8b", "70b"])
def test_a_checkpoint_has_three_fp32_values_for_each_weight(name: str) -> None:
    assert checkpoint_bytes(shipped(name), JobConfig()) == 12 * count_weights(shipped(name))


def test_a_checkpoint_on_disk_is_as_large_as_its_optimizer_makes_it() -> None:
    """Beside the elements of what each rule of the engine saves."""
    import torch

    from fm9g.engine.optimizers import OptimizerConfig, ShardLayout, build_optimizers
    from fm9g.model.transformer import is_mup_scaled, weight_shapes

    shapes = weight_shapes(SMALL)
    weights = sum(shape.numel() for shape in shapes.values())
    for name in ("adamw", "adamw8bit", "adafactor", "muon", "sgd"):
        matrices = frozenset(filter(is_mup_scaled, shapes))
        config = OptimizerConfig(dict.fromkeys(shapes, 1.0), (0.9, 0.95), 1e-6, 0.1, name, matrices, 0.95, 0.0)
        optimizers = build_optimizers(shapes, config, ShardLayout(shapes.__getitem__, lambda n, t: t, lambda n, t: t))
        count = weights
        for weight, shape in shapes.items():
            optimizers[weight].init_state(
                weight, lambda shape=shape, **kind: torch.zeros(kind.pop("shape", shape), **kind)
            )
            keys = [key for key in optimizers[weight].state[weight] if not key.endswith(".scales")]
            count += sum(optimizers[weight].export_state(weight, key).numel() for key in keys)
        job = JobConfig(optimizer=name, sgd_momentum=0.95)
        assert checkpoint_bytes(SMALL, job) == pytest.approx(4 * count, rel=0.02), name
    last = JobConfig(trainable_layers=1, ema_decay=0.9)
    assert checkpoint_bytes(SMALL, last) == 8 * weights + 8 * layer_weights(SMALL)
    lora = JobConfig(lora_layer=("project_q",), lora_r=4, optimizer="muon")
    adapters = 4 * 2 * 128 * 4  # layers, A and B of C columns and rows, rank
    assert checkpoint_bytes(SMALL, lora) == 8 * adapters
    assert checkpoint_bytes(SMALL, replace(lora, save_model_only=True, ema_decay=0.9)) == 8 * adapters
    assert "the state of muon" in format_table(estimate_job(SMALL, lora))
