"""The small training runs of tests/engine_runs.py on GPUs, each rank in a process of its own.

FM9G_GPU_REHEARSAL=1 has the same tests run on CPUs, bmtrain over its stand-in: it tries the tests, not the GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import engine_runs
import torch
import torch.distributed as dist
from engine_runs import Run, Setup
from ranks import run_ranks

from fm9g.config.train import TrainConfig
from fm9g.engine.base import Engine, LossScale
from fm9g.engine.processes import Processes
from fm9g.train.build import make_engine as make_real_engine

REHEARSAL = bool(os.environ.get("FM9G_GPU_REHEARSAL"))
_stand_in = engine_runs.make_engine


def on_gpus(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(processes, *arguments) in so many processes with a GPU each; what they return, in the order of ranks."""
    return run_ranks(count, _on_gpu, function, arguments)


def _on_gpu(processes: Processes, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if REHEARSAL:
        return function(processes, *arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rank, size = processes.rank, processes.world_size
    dist.destroy_process_group()
    with Processes("cuda", rank, size, rank, size, dist.PrefixStore("gpus", processes.store)) as placed:
        answer = function(placed, *arguments)
    # The caller ends the group that it made.
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.PrefixStore("end", processes.store))
    return answer


@dataclass(frozen=True)
class Course:
    """How a run goes: from step `first` and what `before` holds; repeated: every step sees the same documents;
    loss_scale: of fp16."""

    first: int = 0
    before: Run | None = None
    repeated: bool = False
    loss_scale: float = 0.0


def make_engine(setup: Setup, processes: Processes) -> Engine:
    if REHEARSAL:
        return _stand_in(setup, processes)
    return make_real_engine(TrainConfig(config="x", engine=setup.engine, seed=7), processes)


def patched(course: Course) -> ExitStack:
    """Within it, engine_runs makes the engines of this machine."""
    stack = ExitStack()
    replacements: dict[str, Any] = {"make_engine": make_engine}
    if course.repeated:
        documents = engine_runs.documents
        replacements["documents"] = lambda step: documents(0)
    if course.loss_scale:
        replacements["LossScale"] = lambda: LossScale(course.loss_scale, 5)
    for name, value in replacements.items():
        stack.enter_context(mock.patch.object(engine_runs, name, value))
    return stack


def train_all(processes: Processes, setups: list[Setup], course: Course) -> list[Run] | None:
    """Runs one after the other in the same processes: starting these takes the longest. What came out, on rank 0."""
    with patched(course):
        runs = [engine_runs.run(processes, setup, course.first, course.before) for setup in setups]
    return runs if processes.rank == 0 else None


def start(processes: Processes, setup: Setup) -> Run:
    """The first weights and the state of an optimizer that has done nothing. On a GPU other numbers would be drawn."""
    engine = engine_runs.prepared(setup, processes, {})
    state = {name: value.clone() for name, value in engine.optimizer_state()}
    return Run([], [], {name: weight.clone() for name, weight in engine.weights()}, state, {})
