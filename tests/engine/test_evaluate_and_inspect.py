"""What is looked at without changing it is the same on any number of processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import Setup, documents, needs_bmtrain, prepared
from ranks import run_ranks

from fm9g.data.pack import collate
from fm9g.engine.base import Placement
from fm9g.engine.processes import Processes
from fm9g.engine.statistics import BINS, Statistics
from fm9g.train.loop import to_batch

pytestmark = pytest.mark.xdist_group("optimizers")


def look(processes: Processes, setup: Setup) -> tuple[list[float], dict[str, tuple[Statistics, Statistics]]]:
    """The losses of an evaluation, and the statistics after a step's gradients were added up."""
    engine = prepared(setup, processes, {})
    packs = [collate(group, 32) for group in documents(1)[engine.replica :: engine.replicas]]
    losses = torch.zeros(1)
    for pack in packs:
        losses += engine.evaluate(to_batch(pack, engine.device)[0])[1].sum()
    for number, pack in enumerate(packs):
        batch, _ = to_batch(pack, engine.device)
        engine.backward(engine.forward(batch, number)[0] / 10, last=pack is packs[-1])
    return engine.sum(losses).tolist(), engine.inspect()


@pytest.mark.parametrize(
    ("setup", "processes"),
    [
        (Setup(), 2),
        pytest.param(Setup(placement=Placement(zero_level=0)), 2, marks=pytest.mark.slow),
        pytest.param(Setup(placement=Placement(tp_size=2)), 2, marks=pytest.mark.slow),
        pytest.param(Setup("bmtrain"), 2, marks=needs_bmtrain),
    ],
    ids=["fsdp2", "copies", "tensor-parallel", "bmtrain"],
)
def test_evaluation_and_statistics_are_those_of_one_process(setup: Setup, processes: int) -> None:
    losses, found = run_ranks(processes, look, setup)[0]
    expected_losses, expected = run_ranks(1, look, Setup())[0]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, pair in found.items():
        for ours, theirs in zip(pair, expected[name]):
            assert (ours.count, ours.bad) == (theirs.count, theirs.bad), name
            assert [ours.rms, ours.largest] == pytest.approx([theirs.rms, theirs.largest], rel=1e-3), name
            assert ours.counts.sum() == pytest.approx(ours.count), name
            np.testing.assert_allclose(ours.counts, theirs.counts, atol=max(2.0, 0.01 * ours.count))


def test_statistics_are_those_of_numpy_and_leave_out_what_is_not_finite() -> None:
    from fm9g.engine.statistics import statistics

    values = torch.randn(1000)
    values[:3] = torch.tensor([float("nan"), float("inf"), -50.0])
    with Processes("cpu") as processes:
        same: Any = lambda tensor: tensor  # noqa: E731
        (found,) = statistics([(lambda: values, 1)], same, processes.gather, torch.device("cpu"))
    good = values[2:].numpy()
    assert (found.count, found.bad, found.largest) == (1000, 2, 50.0)
    assert found.rms == pytest.approx(np.sqrt((good**2).mean()), rel=1e-5)
    assert found.sum == pytest.approx(good.sum(), rel=1e-4)
    expected, _ = np.histogram(np.clip(good, found.edges[0], found.edges[-1]), found.edges)
    assert len(found.counts) == BINS
    np.testing.assert_allclose(found.counts, expected, atol=1)
