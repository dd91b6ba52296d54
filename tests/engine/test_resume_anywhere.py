"""Any engine on any number of processes resumes from what any other saved."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers.engine_harness import EngineCase, TrainResult, needs_bmtrain, prepared, train_case
from helpers.spawn import run_ranks

from fm9g.engine.base import ParallelConfig
from fm9g.engine.dist_context import DistContext

pytestmark = pytest.mark.xdist_group("resume")
slow = pytest.mark.slow
HALF, ALL = 3, 6
FSDP = EngineCase(steps=ALL, stop=HALF)
BMTRAIN = EngineCase("bmtrain", steps=ALL, stop=HALF, parallel_config=ParallelConfig(zero_level=2))


@functools.cache
def saved(case: EngineCase, world_size: int) -> TrainResult:
    return run_ranks(world_size, train_case, case)[0]


@functools.cache
def uninterrupted() -> TrainResult:
    return run_ranks(1, train_case, EngineCase(steps=ALL))[0]


def resume(dist_context: DistContext, case: EngineCase, before: TrainResult) -> TrainResult:
    return train_case(dist_context, case, first=HALF, before=before)


def load_only(dist_context: DistContext, case: EngineCase, before: TrainResult) -> tuple[dict, dict]:
    is_rank_zero = dist_context.rank == 0
    engine = prepared(case, dist_context, before.weights if is_rank_zero else {})
    engine.load_optimizer_state(before.optimizer if is_rank_zero else {})
    return dict(engine.weights()), dict(engine.optimizer_state())


def assert_resumes(before: TrainResult, case: EngineCase, world_size: int) -> None:
    after = run_ranks(world_size, resume, case, before)[0]
    expected = uninterrupted()
    assert after.losses == pytest.approx(expected.losses[HALF:], abs=1e-5)
    assert after.norms == pytest.approx(expected.norms[HALF:], abs=1e-5)
    for name, weight in after.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        (EngineCase(steps=ALL), 1),
        pytest.param(EngineCase(steps=ALL, parallel_config=ParallelConfig(zero_level=0)), 2, marks=slow),
        pytest.param(EngineCase("bmtrain", steps=ALL), 1, marks=[needs_bmtrain, slow]),
        pytest.param(EngineCase("bmtrain", steps=ALL), 2, marks=needs_bmtrain),
    ],
    ids=["torch-1", "copies-2", "bmtrain-1", "bmtrain-2"],
)
def test_from_four_fsdp2_processes(case: EngineCase, world_size: int) -> None:
    assert_resumes(saved(FSDP, 4), case, world_size)


@needs_bmtrain
@pytest.mark.parametrize(
    ("parallel_config", "world_size"),
    [
        (ParallelConfig(), 1),
        pytest.param(ParallelConfig(), 4, marks=slow),
        pytest.param(ParallelConfig(tp_size=2), 2, marks=slow),
    ],
    ids=["torch-1", "fsdp2-4", "tensor-parallel-2"],
)
def test_from_two_bmtrain_processes(parallel_config: ParallelConfig, world_size: int) -> None:
    assert_resumes(saved(BMTRAIN, 2), EngineCase(steps=ALL, parallel_config=parallel_config), world_size)


def test_without_the_optimizers_state_it_would_be_another_run() -> None:
    before = saved(FSDP, 4)
    zeroed = {name: torch.zeros_like(value) for name, value in before.optimizer.items()}
    with pytest.raises(AssertionError):
        assert_resumes(TrainResult([], [], before.weights, zeroed), EngineCase(steps=ALL), 1)


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        (EngineCase(parallel_config=ParallelConfig(zero_level=2)), 2),
        pytest.param(EngineCase(), 8, marks=slow),
        pytest.param(EngineCase(parallel_config=ParallelConfig(tp_size=2, zero_level=2)), 4, marks=slow),
        pytest.param(EngineCase("bmtrain"), 4, marks=[needs_bmtrain, slow]),
    ],
    ids=["fsdp2-2", "fsdp2-8", "tensor-parallel-4", "bmtrain-4"],
)
def test_loading_restores_what_was_saved_bit_for_bit(case: EngineCase, world_size: int) -> None:
    before = saved(FSDP, 4)
    weights, optimizer = run_ranks(world_size, load_only, case, before)[0]
    for actual, expected in ((weights, before.weights), (optimizer, before.optimizer)):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", [pytest.param("torch", marks=slow), pytest.param("bmtrain", marks=needs_bmtrain)])
def test_half_precision_resumes_exactly(engine: str) -> None:
    """A checkpoint contains the fp32 masters, from which the weights of the computation are rounded."""
    case = EngineCase(engine, steps=ALL, parallel_config=ParallelConfig(dtype=torch.bfloat16))
    uninterrupted = run_ranks(1, train_case, case)[0]
    after = run_ranks(1, resume, case, run_ranks(1, train_case, replace(case, stop=HALF))[0])[0]
    assert (after.losses, after.norms) == (uninterrupted.losses[HALF:], uninterrupted.norms[HALF:])
    assert all(torch.equal(weight, after.weights[name]) for name, weight in uninterrupted.weights.items())
