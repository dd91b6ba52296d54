"""What is looked at without changing it is the same on any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_harness import EngineCase, documents, needs_bmtrain, prepared
from helpers.spawn import run_ranks

from fm9g.data.load.packing import collate
from fm9g.engine.base import ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.tensor_stats import NUM_BINS, TensorStats
from fm9g.train.loop import to_batch

pytestmark = pytest.mark.xdist_group("optimizers")


def look(dist_context: DistContext, case: EngineCase) -> tuple[list[float], dict[str, tuple[TensorStats, TensorStats]]]:
    """The losses of an evaluation, and the statistics after a step's gradients were added up."""
    engine = prepared(case, dist_context, {})
    packs = [collate(group, 32) for group in documents(1)[engine.dp_rank :: engine.dp_size]]
    losses = torch.zeros(1)
    for pack in packs:
        losses += engine.evaluate(to_batch(pack, engine.device)[0])[1].sum()
    for number, pack in enumerate(packs):
        batch, _ = to_batch(pack, engine.device)
        engine.backward(engine.forward(batch, number)[0] / 10, is_last_micro_batch=pack is packs[-1])
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
    losses, found = run_ranks(world_size, look, case)[0]
    expected_losses, expected = run_ranks(1, look, EngineCase())[0]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, pair in found.items():
        for ours, theirs in zip(pair, expected[name]):
            assert (ours.count, ours.num_nonfinite) == (theirs.count, theirs.num_nonfinite), name
            assert [ours.rms, ours.max_abs] == pytest.approx([theirs.rms, theirs.max_abs], rel=1e-3), name
            assert ours.counts.sum() == pytest.approx(ours.count), name
            np.testing.assert_allclose(ours.counts, theirs.counts, atol=max(2.0, 0.01 * ours.count))


def test_statistics_are_those_of_numpy_and_leave_out_what_is_not_finite() -> None:
    from fm9g.engine.tensor_stats import compute_tensor_stats

    values = torch.randn(1000)
    values[:3] = torch.tensor([float("nan"), float("inf"), -50.0])
    with DistContext("cpu") as dist_context:
        same: Any = lambda tensor: tensor  # noqa: E731
        (found,) = compute_tensor_stats(
            [(lambda: values, 1)], same, dist_context.all_gather_object, torch.device("cpu")
        )
    good = values[2:].numpy()
    assert (found.count, found.num_nonfinite, found.max_abs) == (1000, 2, 50.0)
    assert found.rms == pytest.approx(np.sqrt((good**2).mean()), rel=1e-5)
    assert found.sum == pytest.approx(good.sum(), rel=1e-4)
    expected, _ = np.histogram(np.clip(good, found.edges[0], found.edges[-1]), found.edges)
    assert len(found.counts) == NUM_BINS
    np.testing.assert_allclose(found.counts, expected, atol=1)
