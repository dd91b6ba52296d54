"""The small training runs of tests/helpers/engine_harness.py on GPUs, each rank in a process of its own.

FM9G_GPU_REHEARSAL=1 runs the same tests on CPUs, bmtrain over gloo: that tests the tests, not the GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from helpers import engine_harness
from helpers.engine_harness import EngineCase, TrainResult
from helpers.spawn import run_ranks

from fm9g.config.train import TrainConfig
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.train.model_setup import make_engine as make_gpu_engine

REHEARSAL = bool(os.environ.get("FM9G_GPU_REHEARSAL"))


def on_gpus(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(dist_context, *arguments) in so many processes with a GPU each; their results, in the order of ranks."""
    return run_ranks(count, _on_gpu, function, arguments)


def _on_gpu(dist_context: DistContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if REHEARSAL:
        return function(dist_context, *arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rank, size = dist_context.rank, dist_context.world_size
    dist.destroy_process_group()
    with DistContext("cuda", rank, size, rank, size, dist.PrefixStore("gpus", dist_context.store)) as gpu_context:
        answer = function(gpu_context, *arguments)
    # The caller destroys the group that it created.
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.PrefixStore("end", dist_context.store))
    return answer


def make_engine(case: EngineCase, dist_context: DistContext) -> Engine:
    """The engine of a case on this machine's GPUs."""
    if REHEARSAL:
        return engine_harness.make_cpu_engine(case, dist_context)
    return make_gpu_engine(TrainConfig(config="x", engine=case.engine, seed=7), dist_context)


def train_on_gpus(
    dist_context: DistContext, cases: list[EngineCase], first: int, before: TrainResult | None
) -> list[TrainResult] | None:
    """Several runs in the same processes, whose start takes longest. Returns their results on rank 0.

    first, before: as for engine_harness.train_case.
    """
    runs = [engine_harness.train_case(dist_context, case, first, before, make_engine) for case in cases]
    return runs if dist_context.rank == 0 else None


def start(dist_context: DistContext, case: EngineCase) -> TrainResult:
    """Initial weights, and the state of an optimizer before its first step. A GPU would draw other numbers."""
    engine = engine_harness.prepared(case, dist_context, {})
    state = {name: value.clone() for name, value in engine.optimizer_state()}
    return TrainResult([], [], {name: weight.clone() for name, weight in engine.weights()}, state)
