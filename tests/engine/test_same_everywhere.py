"""One training, distributed in every way: the same losses, norms, weights and moments.

All runs see the same documents of unequal length, four micro-batches per step: one process accumulates four, four
processes one each. Everything is fp32; only the order of sums differs, and so their rounding.
"""

import functools
import math
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from helpers.engine_harness import EngineCase, TrainResult, needs_bmtrain, train_cases
from helpers.spawn import run_ranks

from fm9g.engine.base import ParallelConfig

# The tolerances are for 50 steps, which `make test-all` runs; fewer show the same mistakes sooner.
STEPS = int(os.environ.get("FM9G_ENGINE_STEPS", "8"))
LOSS, NORM, WEIGHT = 2e-5, 2e-5, 5e-4  # absolute; losses are about 6, norms about 1, weights about 0.1


@functools.cache
def on_one_process(frozen: str, adapters: str = "") -> TrainResult:
    return run_ranks(1, train_cases, [EngineCase(frozen=frozen, adapters=adapters, steps=STEPS)])[0][0]


def distance(one: TrainResult, other: TrainResult) -> tuple[float, float, float]:
    """The largest differences of losses, of gradient norms, and of weights and moments."""
    assert len(one.losses) == len(other.losses) == STEPS
    assert one.weights.keys() == other.weights.keys()
    assert one.optimizer.keys() == other.optimizer.keys()
    pairs = [(one.weights[name], other.weights[name]) for name in one.weights]
    pairs += [(one.optimizer[name], other.optimizer[name]) for name in one.optimizer]
    return (
        max(abs(a - b) for a, b in zip(one.losses, other.losses)),
        max(abs(a - b) for a, b in zip(one.norms, other.norms)),
        max((a - b).abs().max().item() for a, b in pairs),
    )


def assert_same(case: EngineCase, run: TrainResult) -> None:
    loss, norm, weight = distance(on_one_process(case.frozen, case.adapters), run)
    assert loss < LOSS, (case, loss)
    assert norm < NORM, (case, norm)
    assert weight < WEIGHT, (case, weight)


def assert_all_same(world_size: int, cases: list[EngineCase]) -> None:
    cases = [replace(case, steps=STEPS) for case in cases]
    for case, run in zip(cases, run_ranks(world_size, train_cases, cases)[0]):
        assert_same(case, run)


ADAPTERS = ["peft", *(["opendelta"] if find_spec("opendelta") else []), "dora", "nf4", "modules"]
pytestmark = pytest.mark.xdist_group("engines")  # they share runs, and the server that forks processes
slow = pytest.mark.slow


@pytest.mark.parametrize("frozen", ["", *(pytest.param(frozen, marks=slow) for frozen in ("lower", "most"))])
def test_fsdp2_on_two_processes(frozen: str) -> None:
    assert_all_same(
        2, [EngineCase(frozen=frozen, parallel_config=ParallelConfig(zero_level=level)) for level in (3, 2, 0)]
    )


@pytest.mark.parametrize("adapters", [a if a in ("peft", "nf4") else pytest.param(a, marks=slow) for a in ADAPTERS])
def test_adapters_by_fsdp2_on_two_processes(adapters: str) -> None:
    assert_all_same(
        2, [EngineCase(adapters=adapters, parallel_config=ParallelConfig(zero_level=level)) for level in (3, 0)]
    )


@needs_bmtrain
@pytest.mark.parametrize("adapters", [a if a == "peft" else pytest.param(a, marks=slow) for a in ADAPTERS])
def test_adapters_by_bmtrain_on_two_processes(adapters: str) -> None:
    parallel_configs = [ParallelConfig(zero_level=3), ParallelConfig(zero_level=2, checkpointing="full")]
    assert_all_same(
        2,
        [
            EngineCase(engine="bmtrain", adapters=adapters, parallel_config=parallel_config)
            for parallel_config in parallel_configs
        ],
    )


def test_opendelta_is_peft_bit_for_bit() -> None:
    if "opendelta" not in ADAPTERS:
        pytest.skip("opendelta is not installed")
    one, other = on_one_process("", "peft"), on_one_process("", "opendelta")
    assert (one.losses, one.norms) == (other.losses, other.norms)
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@functools.cache
def unpacked_on_one_process() -> TrainResult:
    return run_ranks(1, train_cases, [EngineCase(packing=False, steps=STEPS)])[0][0]


@pytest.mark.parametrize(
    ("engine", "parallel_configs"),
    [
        ("torch", [ParallelConfig(zero_level=3), ParallelConfig(zero_level=0), ParallelConfig(tp_size=2)]),
        pytest.param("bmtrain", [ParallelConfig(zero_level=3), ParallelConfig(zero_level=2)], marks=needs_bmtrain),
    ],
)
def test_a_replica_without_a_sample_changes_nothing(engine: str, parallel_configs: list[ParallelConfig]) -> None:
    cases = [EngineCase(engine, config, steps=STEPS, packing=False) for config in parallel_configs]
    for case, run in zip(cases, run_ranks(2, train_cases, cases)[0]):
        assert all(map(math.isfinite, [*run.losses, *run.norms])), case
        loss, norm, weight = distance(unpacked_on_one_process(), run)
        assert (loss < LOSS, norm < NORM, weight < WEIGHT) == (True, True, True), (case, loss, norm, weight)


@slow
def test_fsdp2_on_four_processes() -> None:
    assert_all_same(4, [EngineCase(parallel_config=ParallelConfig(zero_level=3, checkpointing="full"))])


@pytest.mark.parametrize(
    "parallel_config",
    [
        ParallelConfig(tp_size=2),
        pytest.param(ParallelConfig(tp_size=2, sequence_parallel=False, checkpointing="selective"), marks=slow),
    ],
    ids=["sequence-parallel", "replicated-norms"],
)
def test_tensor_parallelism_on_two_processes(parallel_config: ParallelConfig) -> None:
    assert_all_same(2, [EngineCase(parallel_config=parallel_config)])


@slow
def test_tensor_parallelism_of_a_tied_model_with_an_uneven_vocabulary_and_frozen_layers() -> None:
    changes = (("tie_word_embeddings", True), ("vocab_size", 321))
    case = EngineCase(frozen="lower", parallel_config=ParallelConfig(tp_size=2), steps=STEPS, model=changes)
    alone = run_ranks(1, train_cases, [replace(case, parallel_config=ParallelConfig())])
    split = run_ranks(2, train_cases, [case])
    loss, norm, weight = distance(alone[0][0], split[0][0])
    assert loss < LOSS
    assert norm < NORM
    assert weight < WEIGHT


@pytest.mark.slow
def test_sliding_windows_by_every_engine() -> None:
    """Documents have up to 30 tokens, the window of the second layer 6."""
    windows = (("sliding_window", 6), ("layer_types", ["full_attention", "sliding_attention"]))
    case = EngineCase(steps=STEPS, model=windows)
    alone = run_ranks(1, train_cases, [case])[0][0]
    assert distance(alone, on_one_process(""))[0] > 10 * LOSS  # the window has an effect
    parallel_configs = [
        ParallelConfig(tp_size=2, checkpointing="selective"),
        ParallelConfig(zero_level=3, checkpointing="full"),
    ]
    cases = [replace(case, parallel_config=parallel_config) for parallel_config in parallel_configs]
    cases += [replace(case, engine="bmtrain")] if find_spec("bmtrain") else []
    for run in run_ranks(2, train_cases, cases)[0]:
        loss, norm, weight = distance(alone, run)
        assert loss < LOSS
        assert norm < 20 * NORM  # norms are up to 4 here, and the order of sums depends on the CPU
        assert weight < WEIGHT


@needs_bmtrain
@pytest.mark.parametrize(
    ("world_size", "frozen"),
    [
        (2, ""),
        (2, "lower"),
        *(pytest.param(*case, marks=slow) for case in [(1, ""), (1, "lower"), (1, "most"), (2, "most")]),
    ],
)
def test_bmtrain(world_size: int, frozen: str) -> None:
    parallel_configs = [
        ParallelConfig(zero_level=level, checkpointing=how) for level, how in ((3, "none"), (2, "full"))
    ]
    if not frozen and STEPS == 50:
        parallel_configs += [ParallelConfig(zero_level=3, checkpointing="selective"), ParallelConfig(zero_level=2)]
    assert_all_same(
        world_size,
        [
            EngineCase(engine="bmtrain", frozen=frozen, parallel_config=parallel_config)
            for parallel_config in parallel_configs
        ],
    )


@pytest.mark.parametrize(
    "case",
    [
        EngineCase(parallel_config=ParallelConfig(zero_level=3)),
        pytest.param(EngineCase(parallel_config=ParallelConfig(zero_level=0)), marks=slow),
        pytest.param(EngineCase(parallel_config=ParallelConfig(tp_size=2)), marks=slow),
        pytest.param(EngineCase(engine="bmtrain"), marks=needs_bmtrain),
        pytest.param(EngineCase(engine="bmtrain", frozen="most"), marks=[needs_bmtrain, slow]),
    ],
    ids=["fsdp2", "copies", "tensor-parallel", "bmtrain", "bmtrain-frozen"],
)
def test_without_the_reduction_of_gradients_they_differ(case: EngineCase) -> None:
    case = replace(case, steps=STEPS, broken=True)
    loss, norm, weight = distance(on_one_process(case.frozen), run_ranks(2, train_cases, [case])[0][0])
    assert loss > 10 * LOSS
    assert norm > 10 * NORM
    assert weight > 10 * WEIGHT


@needs_bmtrain
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [
        (torch.bfloat16, ""),
        (torch.float16, ""),
        (torch.bfloat16, "peft"),
        pytest.param(torch.bfloat16, "nf4", marks=slow),
    ],
)
def test_half_precision_is_the_same_bit_for_bit_on_one_process_of_either_engine(
    dtype: torch.dtype, adapters: str
) -> None:
    """Both round weights, sum gradients of micro-batches and keep fp32 masters at the same points."""
    case = EngineCase(steps=4, adapters=adapters, parallel_config=ParallelConfig(dtype=dtype))
    offloaded = replace(case, engine="bmtrain", parallel_config=ParallelConfig(dtype=dtype, zero_level=2, offload=True))
    runs = run_ranks(1, train_cases, [case, replace(case, engine="bmtrain"), offloaded])[0]
    for other in runs[1:]:
        assert (other.losses, other.norms) == (runs[0].losses, runs[0].norms)
        assert all(torch.equal(weight, other.weights[name]) for name, weight in runs[0].weights.items())
        assert all(torch.equal(state, other.optimizer[name]) for name, state in runs[0].optimizer.items())
