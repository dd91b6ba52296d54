"""A small training run on any engine and number of processes, from documents that are the same for all of them."""

from __future__ import annotations

import contextlib
import importlib.util
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from support import small_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from fm9g.config.adapter import AdapterConfig
from fm9g.config.train import TrainConfig
from fm9g.data.pack import Pack, Sample, collate
from fm9g.data.tokens import mark
from fm9g.engine.base import Engine, LossScale, Placement
from fm9g.engine.processes import Processes
from fm9g.engine.rules import OptimizerSettings
from fm9g.lora.inject import inject, known_as
from fm9g.lora.quantize import quantize_layers
from fm9g.model.transformer import FM9G, is_width_scaled
from fm9g.train.clock import Clock
from fm9g.train.loop import TrainState, train

CAPACITY, PACKS = 32, 4  # tokens of a micro-batch; micro-batches a step over all processes


needs_bmtrain = pytest.mark.skipif(
    importlib.util.find_spec("bmtrain") is None, reason="bmtrain has wheels for Python 3.10 and 3.11 alone"
)


@dataclass(frozen=True)
class Setup:
    """engine: torch or bmtrain. stop: earlier than steps. frozen: what of the model is not trained: "", lower or most.
    adapters: peft, opendelta, dora or nf4: they alone are trained; "": there are none.
    broken: every process keeps its own gradients instead of adding them up. optimizer: with a mean of weights, where it
    is another one than adamw.
    """

    engine: str = "torch"
    placement: Placement = Placement()
    steps: int = 50
    stop: int = 0
    frozen: str = ""
    adapters: str = ""
    model: tuple[tuple[str, Any], ...] = ()
    broken: bool = False
    optimizer: str = "adamw"


@dataclass
class Run:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    means: dict[str, torch.Tensor]


def documents(step: int) -> list[list[Sample]]:
    """Four groups of documents of unequal length, each fitting in one row, with masked inputs of unequal share."""
    source = np.random.default_rng(step)
    groups = []
    for lengths in ([30], [3, 20, 5], [1, 1], [16, 14]):
        group = []
        for length in lengths:
            ids = source.integers(0, 320, length)
            tokens = np.append(ids, ids[:1]).astype(np.int32)
            read = source.integers(0, length)
            weights = np.where(np.arange(length + 1) > read, 1.0, 0.0)
            if length % 3 == 0:  # some documents count less
                weights[read + 1 :: 2] = 0.25
            tokens = mark(tokens, weights)
            group.append(Sample(tokens, dataset=length % 2, place=0, piece=0))
        groups.append(group)
    return groups


class Dealt:
    """A loader of the same documents for all, dealt to the replicas as fm9g.data.loader deals streams."""

    endless = True

    def __init__(self, replica: int, replicas: int, step: int) -> None:
        self.replica, self.replicas, self.step = replica, replicas, step

    def next_step(self) -> list[Pack]:
        self.step += 1
        return [collate(group, CAPACITY) for group in documents(self.step)[self.replica :: self.replicas]]


class Figures:
    """A desk that keeps the figures of each step, and does nothing else."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def wishes(self) -> tuple[bool, bool]:
        return False, False

    def stepped(self) -> None: ...

    def skipped(self, *_: object) -> None: ...

    def inspect(self) -> None: ...

    def log(self, figures: dict[str, float], clock: Clock) -> None:
        self.lines.append(figures)

    def evaluate(self) -> bool:
        return False

    def save(self) -> None: ...


def make_engine(setup: Setup, processes: Processes) -> Engine:
    if setup.engine == "bmtrain":
        import bmtrain_stand_in

        bmtrain_stand_in.install()
        from fm9g.engine.bmtrain import BMTrainEngine

        return BMTrainEngine(processes, seed=7)
    from fm9g.engine.torch import TorchEngine

    return TorchEngine(processes, seed=7)


def prepared(setup: Setup, processes: Processes, weights: dict[str, torch.Tensor]) -> Engine:
    """weights: the first ones; those that are missing are new."""
    config = small_model(**dict(setup.model))
    with torch.device("meta"):
        model = FM9G(config)
    if setup.adapters:
        if setup.adapters == "nf4":
            quantize_layers(model.encoder.layers, "nf4", double=True)
        about = AdapterConfig(r=3, alpha=6.0, layers=["project_q", "w_1", "w_out"], dora=setup.adapters == "dora")
        inject(model, model.encoder.layers, about, "opendelta" if setup.adapters == "opendelta" else "peft")
    for name, weight in model.named_parameters() if not setup.adapters else ():
        lower = name.startswith(("input_embedding", "encoder.layers.0."))
        kept = {"": True, "lower": not lower, "most": "project_q" in name}[setup.frozen]
        weight.requires_grad_(kept)
    names = [known_as(name) for name, _ in model.named_parameters()]
    scales = {name: 0.5 if is_width_scaled(name) else 1.0 for name in names}
    engine = make_engine(setup, processes)
    engine.prepare(
        model,
        model.encoder.layers,
        lambda name, weight: weight.copy_(weights[name]) if name in weights else model.init_weight(name, weight, 3),
        OptimizerSettings(
            scales,
            (0.9, 0.95),
            1e-6,
            0.1,
            name=setup.optimizer,
            matrices=frozenset(name for name in scales if is_width_scaled(name)),
            ema_decay=0.0 if setup.optimizer == "adamw" else 0.5,
        ),
        replace(setup.placement, checkpointed_layers=1, narrow_frozen=bool(setup.adapters)),
        LossScale(),
        known_as,
    )
    return engine


@contextlib.contextmanager
def broken(setup: Setup, engine: Engine) -> Iterator[None]:
    """Takes the reduction of gradients out of an engine."""
    if setup.engine == "bmtrain":
        import bmtrain_stand_in

        with bmtrain_stand_in.sabotage("ncclReduceScatter"):
            yield
    elif setup.placement.tp_size > 1:
        with unittest.mock.patch("fm9g.model.loss._Vocabulary.total", lambda self, values, *_: values):
            yield
    elif setup.placement.zero_level == 0:
        backward = engine.backward
        engine.backward = lambda loss, last: backward(loss, False)  # type: ignore[method-assign]
        yield
    else:
        for module in engine._model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_OwnPart())
        yield


class _OwnPart(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, **_: Any) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


def run(processes: Processes, setup: Setup, first: int = 0, before: Run | None = None) -> Run:
    """Trains; what came out is whole on rank 0. first: steps done before, which gave `before`."""
    engine = prepared(setup, processes, before.weights if before else {})
    if before:
        engine.load_optimizer_state(before.optimizer if processes.rank == 0 else {})
        engine.load_mean_weights(before.means if processes.rank == 0 else {})
    config = TrainConfig(
        config="x", train_iters=setup.steps, stop_iters=setup.stop, warmup_iters=0, lr=0.01, clip_grad=0.7
    )
    figures = Figures()
    loader: Any = Dealt(engine.replica, engine.replicas, first)
    state = TrainState(first, np.zeros(2, np.int64))
    with broken(setup, engine) if setup.broken else contextlib.nullcontext():
        train(config, ["even", "odd"], engine, loader, state, figures, Clock())
    # On ranks but the first the tensors are not whole, and nobody looks at them.
    weights = {name: weight.clone() for name, weight in engine.weights()}
    state_of_optimizer = {name: value.clone() for name, value in engine.optimizer_state()}
    lines = figures.lines
    return Run(
        [line["Loss/train"] for line in lines],
        [line["Optimizer/grad_norm"] for line in lines],
        weights,
        state_of_optimizer,
        {name: value.clone() for name, value in engine.mean_weights()},
    )


def run_all(processes: Processes, setups: list[Setup]) -> list[Run]:
    """Several runs in the same processes: starting these takes the longest."""
    return [run(processes, setup) for setup in setups]
