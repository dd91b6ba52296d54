"""Both engines on GPUs: the same numbers as on a CPU, half precision, resuming, and steps without waiting."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gpu.gpu_harness import REHEARSAL, make_engine, on_gpus, start, train_on_gpus
from helpers import engine_harness
from helpers.engine_harness import EngineCase, TrainResult
from helpers.spawn import run_ranks

from fm9g.data.load.packing import collate
from fm9g.engine.base import ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.train.batch import to_batch

STEPS = 8
# Absolute, in fp32 without TF32; losses are about 6, norms about 1, weights about 0.1. Between CPUs alone they are
# 2e-5, 2e-5, 2e-4. A GPU sums in another order, and Adam's first steps amplify differences of gradients near 0.
LOSS, NORM, WEIGHT = 1e-4, 2e-4, 2e-3
FULL, SELECTIVE = {"checkpointing": "full"}, {"checkpointing": "selective"}
TORCH = [
    {"zero_level": 3},
    {"zero_level": 2},
    {"zero_level": 0},
    FULL,
    SELECTIVE | {"zero_level": 2},
    {"offload": True},
]
BMTRAIN = [
    *({"zero_level": level, "checkpointing": kind} for level in (2, 3) for kind in ("none", "selective", "full")),
    {"offload": True},
]


def make_cases(engine: str, *parallel_configs: dict[str, Any], **changes: Any) -> list[EngineCase]:
    return [
        EngineCase(engine=engine, parallel_config=ParallelConfig(**each), steps=STEPS, **changes)
        for each in parallel_configs
    ]


@functools.cache
def beginning(frozen: str = "", model: tuple[tuple[str, Any], ...] = ()) -> TrainResult:
    return run_ranks(1, start, EngineCase(frozen=frozen, model=model))[0]


@functools.cache
def on_cpu(frozen: str = "", steps: int = STEPS) -> TrainResult:
    """One process with the torch engine, from the same initial weights."""
    return run_ranks(1, engine_harness.train_case, EngineCase(frozen=frozen, steps=steps), 0, beginning(frozen))[0]


def train(count: int, cases: list[EngineCase], first: int = 0, before: TrainResult | None = None) -> list[TrainResult]:
    before = before or beginning(cases[0].frozen, cases[0].model)
    return on_gpus(count, train_on_gpus, cases, first, before)[0]


def assert_same(one: TrainResult, other: TrainResult, about: object) -> None:
    np.testing.assert_allclose(one.losses, other.losses, rtol=0, atol=LOSS, err_msg=str(about))
    np.testing.assert_allclose(one.norms, other.norms, rtol=0, atol=NORM, err_msg=str(about))
    assert one.weights.keys() == other.weights.keys()
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}")
    for name, moment in one.optimizer.items():
        torch.testing.assert_close(
            moment, other.optimizer[name], rtol=0, atol=WEIGHT, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("frozen", ["", "lower", "most"])
def test_torch_on_one_gpu_gives_the_numbers_of_a_cpu(gpus: int, frozen: str) -> None:
    cases = make_cases("torch", *TORCH, frozen=frozen)
    for case, run in zip(cases, train(1, cases)):
        assert_same(run, on_cpu(frozen), case)


@pytest.mark.parametrize("frozen", ["", "lower", "most"])
def test_bmtrain_on_one_gpu_gives_the_numbers_of_a_cpu(gpus: int, bmtrain: None, frozen: str) -> None:
    cases = make_cases("bmtrain", *BMTRAIN, frozen=frozen)
    for case, run in zip(cases, train(1, cases)):
        assert_same(run, on_cpu(frozen), case)


@pytest.mark.parametrize("count", [2, 4])
def test_torch_on_several_gpus_gives_the_numbers_of_a_cpu(gpus: int, count: int) -> None:
    if gpus < count:
        pytest.skip(f"needs {count} NVIDIA GPUs, and there are {gpus}")
    split = [{"tp_size": 2}, {"tp_size": 2, "sequence_parallel": False}, {"tp_size": 2, "zero_level": 0, **FULL}]
    cases = make_cases("torch", *TORCH, *split)
    for case, run in zip(cases, train(count, cases)):
        assert_same(run, on_cpu(), case)


@pytest.mark.parametrize("count", [2, 4])
def test_bmtrain_on_several_gpus_gives_the_numbers_of_a_cpu(gpus: int, bmtrain: None, count: int) -> None:
    if gpus < count:
        pytest.skip(f"needs {count} NVIDIA GPUs, and there are {gpus}")
    cases = make_cases("bmtrain", *BMTRAIN)
    for case, run in zip(cases, train(count, cases)):
        assert_same(run, on_cpu(), case)


@pytest.mark.parametrize("engine", ["torch", "bmtrain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_as_fp32_does(
    gpus: int, engine: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if engine == "bmtrain":
        request.getfixturevalue("bmtrain")
    if dtype == torch.bfloat16 and not REHEARSAL and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    if dtype == torch.float16 and REHEARSAL:
        pytest.skip("fp16 is for GPUs")
    half = [{"dtype": dtype}, {"dtype": dtype, "checkpointing": "full", "zero_level": 2}]
    scale = 2.0**30 if dtype == torch.float16 else 1.0  # so high that it must be halved first
    changes = {"repeat_documents": True, "loss_scaler": (scale, 5 if dtype == torch.float16 else 0)}
    cases = [replace(case, steps=25) for case in make_cases(engine, *half, {}, **changes)]
    *runs, fp32 = train(1, cases)
    assert fp32.losses[-1] < 0.5 * fp32.losses[0]
    for run in runs:
        assert run.losses[0] == pytest.approx(fp32.losses[0], rel=2e-2)
        steps, last_scale, _ = run.optimizer["numbers"].tolist()
        if dtype == torch.float16:
            assert 10 <= steps < 25  # some were skipped
            assert 1 < last_scale < scale
            assert run.losses[-1] < 0.7 * run.losses[0]
        else:
            assert steps == 25
            assert run.losses[-1] == pytest.approx(fp32.losses[-1], rel=0.1)


@pytest.mark.parametrize(("one", "other"), [("torch", "bmtrain"), ("bmtrain", "torch"), ("torch", "torch")])
def test_a_run_resumes_under_another_engine(gpus: int, one: str, other: str, request: pytest.FixtureRequest) -> None:
    if "bmtrain" in (one, other):
        request.getfixturevalue("bmtrain")
    count = min(gpus, 2)
    half = train(1, [replace(make_cases(one, {})[0], stop=STEPS // 2)])[0]
    (rest,) = train(count, make_cases(other, {"zero_level": 2}), first=STEPS // 2, before=half)
    full = replace(on_cpu(), losses=on_cpu().losses[STEPS // 2 :], norms=on_cpu().norms[STEPS // 2 :])
    assert_same(rest, full, (one, other))


@pytest.mark.parametrize("engine", ["torch", "bmtrain"])
def test_a_resumed_run_is_the_same_bit_for_bit(gpus: int, engine: str, request: pytest.FixtureRequest) -> None:
    if engine == "bmtrain":
        request.getfixturevalue("bmtrain")
    cases = make_cases(engine, {})
    full = train(1, cases)[0]
    half = train(1, [replace(cases[0], stop=STEPS // 2)])[0]
    rest = train(1, cases, first=STEPS // 2, before=half)[0]
    assert rest.norms == full.norms[STEPS // 2 :]
    assert rest.losses == full.losses[STEPS // 2 :]
    assert all(torch.equal(weight, full.weights[name]) for name, weight in rest.weights.items())


def step_without_waiting(dist_context: DistContext, case: EngineCase) -> None:
    engine = engine_harness.prepared(case, dist_context, {}, make_engine)
    packs = [collate(group, engine_harness.CAPACITY) for group in engine_harness.documents(1)]
    for number in range(3):
        if number == 2 and not REHEARSAL:  # by now libraries are loaded and memory is allocated
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        tasks = torch.zeros(2, device=engine.device)
        for i, pack in enumerate(packs):
            batch, rows = to_batch(pack, engine.device)
            loss, losses = engine.forward(batch, i)
            engine.backward(loss / 100, is_last_micro_batch=i == len(packs) - 1)
            tasks.index_add_(0, rows, losses)
        engine.step(1e-3, 1.0)
    if not REHEARSAL:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ["torch", "bmtrain"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_step_that_does_not_log_does_not_wait_for_the_gpu(
    gpus: int, engine: str, checkpointing: str, request: pytest.FixtureRequest
) -> None:
    """As far as torch reports it. bmtrain waits for an event of the layer before, which torch does not report."""
    if engine == "bmtrain":
        request.getfixturevalue("bmtrain")
    dtype = torch.float32 if REHEARSAL else torch.bfloat16
    for count in {1, min(gpus, 2)}:
        on_gpus(count, step_without_waiting, *make_cases(engine, {"dtype": dtype, "checkpointing": checkpointing}))
