"""The small training runs of tests/helpers/engine_harness.py on GPUs, each rank in a process of its own.

FM9G_GPU_REHEARSAL=1 has the same tests run on CPUs, bmtrain over its stand-in: it tries the tests, not the GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers import engine_harness
from helpers.engine_harness import EngineCase, TrainResult
from helpers.spawn import run_ranks

from fm9g.config.train import TrainConfig
from fm9g.engine.base import DynamicLossScaler, Engine
from fm9g.engine.dist_context import DistContext
from fm9g.train.model_setup import make_engine as make_real_engine

REHEARSAL = bool(os.environ.get("FM9G_GPU_REHEARSAL"))
_make_cpu_engine = engine_harness.make_engine


def on_gpus(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(dist_context, *arguments) in so many processes with a GPU each; what they return, in the order of
    ranks."""
    return run_ranks(count, _on_gpu, function, arguments)


def _on_gpu(dist_context: DistContext, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if REHEARSAL:
        return function(dist_context, *arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rank, size = dist_context.rank, dist_context.world_size
    dist.destroy_process_group()
    with DistContext("cuda", rank, size, rank, size, dist.PrefixStore("gpus", dist_context.store)) as gpu_context:
        answer = function(gpu_context, *arguments)
    # The caller ends the group that it made.
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.PrefixStore("end", dist_context.store))
    return answer


@dataclass(frozen=True)
class RunOptions:
    """How a run goes: from step `first` and what `before` holds; repeated: every step sees the same documents;
    loss_scale: of fp16."""

    first: int = 0
    before: TrainResult | None = None
    repeated: bool = False
    loss_scale: float = 0.0


def make_engine(case: EngineCase, dist_context: DistContext) -> Engine:
    if REHEARSAL:
        return _make_cpu_engine(case, dist_context)
    return make_real_engine(TrainConfig(config="x", engine=case.engine, seed=7), dist_context)


def patched(options: RunOptions) -> ExitStack:
    """Within it, engine_harness makes the engines of this machine."""
    stack = ExitStack()
    replacements: dict[str, Any] = {"make_engine": make_engine}
    if options.repeated:
        documents = engine_harness.documents
        replacements["documents"] = lambda step: documents(0)
    if options.loss_scale:
        replacements["DynamicLossScaler"] = lambda: DynamicLossScaler(options.loss_scale, 5)
    for name, value in replacements.items():
        stack.enter_context(mock.patch.object(engine_harness, name, value))
    return stack


def train_on_gpus(dist_context: DistContext, cases: list[EngineCase], options: RunOptions) -> list[TrainResult] | None:
    """Runs one after the other in the same processes: starting these takes the longest. What came out, on rank 0."""
    with patched(options):
        runs = [engine_harness.train_case(dist_context, case, options.first, options.before) for case in cases]
    return runs if dist_context.rank == 0 else None


def start(dist_context: DistContext, case: EngineCase) -> TrainResult:
    """The first weights and the state of an optimizer that has done nothing. On a GPU other numbers would be drawn."""
    engine = engine_harness.prepared(case, dist_context, {})
    state = {name: value.clone() for name, value in engine.optimizer_state()}
    return TrainResult([], [], {name: weight.clone() for name, weight in engine.weights()}, state, {})
