"""Evaluation and statistics of weights are the same on any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.engine_harness import EngineCase, documents, needs_bmtrain, prepared
from helpers.spawn import run_ranks

from fm9g.data.load.packing import collate
from fm9g.engine.base import ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.tensor_stats import TensorStats
from fm9g.train.batch import to_batch

pytestmark = pytest.mark.xdist_group("optimizers")


def measure(
    dist_context: DistContext, case: EngineCase
) -> tuple[list[float], dict[str, tuple[TensorStats, TensorStats]]]:
    """The losses of an evaluation, and the statistics once the gradients of a step are summed."""
    engine = prepared(case, dist_context, {})
    packs = [collate(group, 32) for group in documents(1)[engine.dp_rank :: engine.dp_size]]
    losses = torch.zeros(1)
    for pack in packs:
        losses += engine.evaluate(to_batch(pack, engine.device)[0])[1].sum()
    for i, pack in enumerate(packs):
        batch, _ = to_batch(pack, engine.device)
        engine.backward(engine.forward(batch, i)[0] / 10, is_last_micro_batch=pack is packs[-1])
    return engine.dp_sum(losses).tolist(), engine.tensor_stats()


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        (EngineCase(), 2),
        pytest.param(EngineCase(parallel_config=ParallelConfig(zero_level=0)), 2, marks=pytest.mark.slow),
        pytest.param(EngineCase(parallel_config=ParallelConfig(tp_size=2)), 2, marks=pytest.mark.slow),
        pytest.param(EngineCase("bmtrain"), 2, marks=needs_bmtrain),
    ],
    ids=["fsdp2", "copies", "tensor-parallel", "bmtrain"],
)
def test_evaluation_and_statistics_are_those_of_one_process(case: EngineCase, world_size: int) -> None:
    losses, stats = run_ranks(world_size, measure, case)[0]
    expected_losses, expected = run_ranks(1, measure, EngineCase())[0]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert stats.keys() == expected.keys()
    for name, pair in stats.items():
        for actual, reference in zip(pair, expected[name]):
            assert (actual.count, actual.num_nonfinite) == (reference.count, reference.num_nonfinite), name
            assert [actual.sum_sq, actual.max_abs] == pytest.approx([reference.sum_sq, reference.max_abs], rel=1e-3), (
                name
            )
            assert actual.counts.sum() == pytest.approx(actual.count), name
            np.testing.assert_allclose(actual.counts, reference.counts, atol=max(2.0, 0.01 * actual.count))
