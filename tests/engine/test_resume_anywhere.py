"""What one engine saved on some number of processes, any engine goes on from on any other."""

import functools
from dataclasses import replace

import pytest
import torch
from engine_runs import Run, Setup, needs_bmtrain, prepared, run
from ranks import run_ranks

from fm9g.engine.base import Placement
from fm9g.engine.processes import Processes

pytestmark = pytest.mark.xdist_group("resume")
slow = pytest.mark.slow
HALF, WHOLE = 3, 6
FSDP = Setup(steps=WHOLE, stop=HALF)
BMTRAIN = Setup("bmtrain", steps=WHOLE, stop=HALF, placement=Placement(zero_level=2))


@functools.cache
def saved(setup: Setup, processes: int) -> Run:
    return run_ranks(processes, run, setup)[0]


@functools.cache
def uninterrupted() -> Run:
    return run_ranks(1, run, Setup(steps=WHOLE))[0]


def go_on(processes: Processes, setup: Setup, before: Run) -> Run:
    return run(processes, setup, first=HALF, before=before)


def load_only(processes: Processes, setup: Setup, before: Run) -> tuple[dict, dict]:
    first = processes.rank == 0
    engine = prepared(setup, processes, before.weights if first else {})
    engine.load_optimizer_state(before.optimizer if first else {})
    return dict(engine.weights()), dict(engine.optimizer_state())


def assert_goes_on(before: Run, setup: Setup, processes: int) -> None:
    after = run_ranks(processes, go_on, setup, before)[0]
    expected = uninterrupted()
    assert after.losses == pytest.approx(expected.losses[HALF:], abs=1e-5)
    assert after.norms == pytest.approx(expected.norms[HALF:], abs=1e-5)
    for name, weight in after.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("setup", "processes"),
    [
        (Setup(steps=WHOLE), 1),
        pytest.param(Setup(steps=WHOLE, placement=Placement(zero_level=0)), 2, marks=slow),
        pytest.param(Setup("bmtrain", steps=WHOLE), 1, marks=[needs_bmtrain, slow]),
        pytest.param(Setup("bmtrain", steps=WHOLE), 2, marks=needs_bmtrain),
    ],
    ids=["torch-1", "copies-2", "bmtrain-1", "bmtrain-2"],
)
def test_from_four_fsdp2_processes(setup: Setup, processes: int) -> None:
    assert_goes_on(saved(FSDP, 4), setup, processes)


@needs_bmtrain
@pytest.mark.parametrize(
    ("placement", "processes"),
    [
        (Placement(), 1),
        pytest.param(Placement(), 4, marks=slow),
        pytest.param(Placement(tp_size=2), 2, marks=slow),
    ],
    ids=["torch-1", "fsdp2-4", "tensor-parallel-2"],
)
def test_from_two_bmtrain_processes(placement: Placement, processes: int) -> None:
    assert_goes_on(saved(BMTRAIN, 2), Setup(steps=WHOLE, placement=placement), processes)


def test_without_the_optimizers_state_it_would_be_another_run() -> None:
    before = saved(FSDP, 4)
    emptied = {name: torch.zeros_like(value) for name, value in before.optimizer.items()}
    with pytest.raises(AssertionError):
        assert_goes_on(Run([], [], before.weights, emptied, {}), Setup(steps=WHOLE), 1)


@pytest.mark.parametrize(
    ("setup", "processes"),
    [
        (Setup(placement=Placement(zero_level=2)), 2),
        pytest.param(Setup(), 8, marks=slow),
        pytest.param(Setup(placement=Placement(tp_size=2, zero_level=2)), 4, marks=slow),
        pytest.param(Setup("bmtrain"), 4, marks=[needs_bmtrain, slow]),
    ],
    ids=["fsdp2-2", "fsdp2-8", "tensor-parallel-4", "bmtrain-4"],
)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(setup: Setup, processes: int) -> None:
    before = saved(FSDP, 4)
    weights, optimizer = run_ranks(processes, load_only, setup, before)[0]
    for found, expected in ((weights, before.weights), (optimizer, before.optimizer)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", [pytest.param("torch", marks=slow), pytest.param("bmtrain", marks=needs_bmtrain)])
def test_half_precision_goes_on_exactly(engine: str) -> None:
    """The checkpoint's weights are the fp32 ones, of which those of the computation are copies."""
    whole = Setup(engine, steps=WHOLE, placement=Placement(dtype=torch.bfloat16))
    uninterrupted = run_ranks(1, run, whole)[0]
    after = run_ranks(1, go_on, whole, run_ranks(1, run, replace(whole, stop=HALF))[0])[0]
    assert (after.losses, after.norms) == (uninterrupted.losses[HALF:], uninterrupted.norms[HALF:])
    assert all(torch.equal(weight, after.weights[name]) for name, weight in uninterrupted.weights.items())
