"""The optimizer over the shards of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fm9g.engine.optimizers import OptimizerConfig, ShardLayout
from fm9g.engine.sharded_optimizer import ShardedOptimizer
from fm9g.errors import UserError

LAYOUT = ShardLayout(lambda _: torch.Size([3]), lambda _, local: local, lambda _, full: full)


def test_only_adamw_and_sgd_can_be_offloaded() -> None:
    weights, config = {"w": torch.zeros(3)}, OptimizerConfig({"w": 1.0}, (0.9, 0.95), 1e-6, 0.0)
    for name in ("adamw", "sgd"):
        assert ShardedOptimizer(weights, replace(config, name=name), LAYOUT, offload=True).masters
    with pytest.raises(UserError, match="offload_optimizer works with optimizer adamw and sgd, not with muon"):
        ShardedOptimizer(weights, replace(config, name="muon"), LAYOUT, offload=True)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_size_of_buckets_changes_no_weight(name: str) -> None:
    """Buckets of one weight, of two, and of all; of muon the second and third weight follow adamw."""
    names = ["a", "b", "c", "d"]
    config = OptimizerConfig(
        dict.fromkeys(names, 1.0), (0.9, 0.95), 1e-6, 0.1, name=name, muon_params=frozenset("ad"), ema_decay=0.5
    )
    layout = ShardLayout(lambda _: torch.Size([2, 3]), lambda _, local: local, lambda _, full: full)
    results = []
    for bucket_size in (1, 12, 1 << 20):
        torch.manual_seed(0)
        weights = {n: torch.randn(2, 3) for n in names}
        grads = {n: torch.randn(2, 3) for n in names}
        optimizer = ShardedOptimizer(weights, config, layout, offload=False, bucket_size=bucket_size)
        for _ in range(2):
            optimizer.step(weights, grads, 0.1, torch.tensor(0.5))
        results.append([*weights.values(), *optimizer.ema.values(), optimizer.step_count])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))
