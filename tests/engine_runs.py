"""A small training run on any engine and number of processes, from documents that are the same for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from support import small_model

from fm9g.config.train import TrainConfig
from fm9g.data.pack import Pack, Sample, collate
from fm9g.engine.base import Engine, LossScale, Placement
from fm9g.engine.optimizer import AdamW
from fm9g.engine.processes import Processes
from fm9g.model.transformer import FM9G, is_width_scaled
from fm9g.train.loop import TrainState, train

CAPACITY, PACKS = 32, 4  # tokens of a micro-batch; micro-batches a step over all processes


@dataclass(frozen=True)
class Setup:
    """engine: torch or bmtrain. frozen: what of the model is not trained: "", lower or most."""

    engine: str = "torch"
    placement: Placement = Placement()
    steps: int = 50
    frozen: str = ""
    model: tuple[tuple[str, Any], ...] = (("num_layers", 3),)
    sabotage: str = ""


@dataclass
class Run:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


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
            tokens[: 1 + read] = ~tokens[: 1 + read]
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
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def advance(self) -> None: ...

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.lines.append(figures)


def make_engine(setup: Setup, processes: Processes) -> Engine:
    if setup.engine == "bmtrain":
        import bmtrain_stand_in

        bmtrain_stand_in.install()
        if setup.sabotage:
            bmtrain_stand_in.sabotage(setup.sabotage)
        from fm9g.engine.bmtrain import BMTrainEngine

        return BMTrainEngine(processes, seed=7)
    from fm9g.engine.torch import TorchEngine

    return TorchEngine(processes, seed=7)


def prepared(setup: Setup, processes: Processes) -> Engine:
    config = small_model(**dict(setup.model))
    with torch.device("meta"):
        model = FM9G(config)
    for name, weight in model.named_parameters():
        lower = name.startswith(("input_embedding", "encoder.layers.0."))
        kept = {"": True, "lower": not lower, "most": "project_q" in name}[setup.frozen]
        weight.requires_grad_(kept)
    scales = {name: 0.5 if is_width_scaled(name) else 1.0 for name, _ in model.named_parameters()}
    engine = make_engine(setup, processes)
    engine.prepare(
        model,
        model.encoder.layers,
        lambda name, weight: model.init_weight(name, weight, 3),
        AdamW(scales, (0.9, 0.95), 1e-6, 0.1),
        replace(setup.placement, checkpointed_layers=2),
        LossScale(),
    )
    return engine


def run(
    processes: Processes, setup: Setup, first: int = 0, optimizer: dict[str, torch.Tensor] | None = None
) -> Run | None:
    """Trains; what came out, on rank 0. first: steps done before, whose optimizer state is given."""
    engine = prepared(setup, processes)
    if first:
        engine.load_optimizer_state(optimizer if processes.rank == 0 and optimizer else {})
    config = TrainConfig(config="x", train_iters=setup.steps, warmup_iters=0, lr=0.01, clip_grad=0.7)
    figures = Figures()
    loader: Any = Dealt(engine.replica, engine.replicas, first)
    state = TrainState(first, np.zeros(2, np.int64))
    train(config, ["even", "odd"], engine, loader, figures, state, lambda: None, lambda: False)  # type: ignore[arg-type]
    # On ranks but the first the tensors are not whole, and nobody looks at them.
    weights = {name: weight.clone() for name, weight in engine.weights()}
    state_of_optimizer = {name: value.clone() for name, value in engine.optimizer_state()}
    lines = figures.lines
    return Run(
        [line["Loss/train"] for line in lines],
        [line["Optimizer/grad_norm"] for line in lines],
        weights,
        state_of_optimizer,
    )
