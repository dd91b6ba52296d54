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
from helpers.common import small_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from fm9g.config.adapter import AdapterConfig
from fm9g.config.train import TrainConfig
from fm9g.data.encode.token_array import make_token_array
from fm9g.data.load.packing import Pack, Sample, collate
from fm9g.engine.base import DynamicLossScaler, Engine, ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.lora.inject import canonical_name, inject_adapters
from fm9g.lora.quantize import quantize_layers
from fm9g.model.transformer import FM9G, is_mup_scaled
from fm9g.train.loop import TrainState, train
from fm9g.train.timer import StepTimer

CAPACITY, PACKS = 32, 4  # tokens of a micro-batch; micro-batches a step over all processes


needs_bmtrain = pytest.mark.skipif(
    importlib.util.find_spec("bmtrain") is None, reason="bmtrain has wheels for Python 3.10 and 3.11 alone"
)


@dataclass(frozen=True)
class EngineCase:
    """engine: torch or bmtrain. stop: earlier than steps. frozen: what of the model is not trained: "", lower or most.
    adapters: peft, opendelta, dora or nf4: they alone are trained; "": there are none.
    broken: every process keeps its own gradients instead of adding them up. optimizer: with a mean of weights, where it
    is another one than adamw.
    """

    engine: str = "torch"
    parallel_config: ParallelConfig = ParallelConfig()
    steps: int = 50
    stop: int = 0
    frozen: str = ""
    adapters: str = ""
    model: tuple[tuple[str, Any], ...] = ()
    broken: bool = False
    optimizer: str = "adamw"


@dataclass
class TrainResult:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]


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
            tokens = make_token_array(tokens, weights)
            group.append(Sample(tokens, dataset=length % 2, sample_index=0, segment=0))
        groups.append(group)
    return groups


class FixedLoader:
    """A loader of the same documents for all, dealt to the replicas as fm9g.data.load.loader deals streams."""

    is_infinite = True

    def __init__(self, dp_rank: int, dp_size: int, step: int) -> None:
        self.dp_rank, self.dp_size, self.step = dp_rank, dp_size, step

    def next_batch(self) -> list[Pack]:
        self.step += 1
        return [collate(group, CAPACITY) for group in documents(self.step)[self.dp_rank :: self.dp_size]]


class RecordingCallbacks:
    """Callbacks that keep the metrics of each step, and do nothing else."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def poll_requests(self) -> tuple[bool, bool]:
        return False, False

    def on_step_end(self) -> None: ...

    def on_step_skipped(self, *_: object) -> None: ...

    def on_inspect(self) -> None: ...

    def on_log(self, metrics: dict[str, float], timer: StepTimer) -> None:
        self.lines.append(metrics)

    def evaluate(self) -> bool:
        return False

    def save(self) -> None: ...


def make_engine(case: EngineCase, dist_context: DistContext) -> Engine:
    if case.engine == "bmtrain":
        from helpers import bmtrain_over_gloo

        bmtrain_over_gloo.install()
        from fm9g.engine.bmtrain import BMTrainEngine

        return BMTrainEngine(dist_context, seed=7)
    from fm9g.engine.fsdp import FSDPEngine

    return FSDPEngine(dist_context, seed=7)


def prepared(case: EngineCase, dist_context: DistContext, weights: dict[str, torch.Tensor]) -> Engine:
    """weights: the first ones; those that are missing are new."""
    config = small_model(**dict(case.model))
    with torch.device("meta"):
        model = FM9G(config)
    if case.adapters:
        if case.adapters == "nf4":
            quantize_layers(model.encoder.layers, "nf4", double_quant=True)
        adapter_config = AdapterConfig(
            r=3, alpha=6.0, layers=["project_q", "w_1", "w_out"], dora=case.adapters == "dora"
        )
        inject_adapters(
            model, model.encoder.layers, adapter_config, "opendelta" if case.adapters == "opendelta" else "peft"
        )
    for name, weight in model.named_parameters() if not case.adapters else ():
        lower = name.startswith(("input_embedding", "encoder.layers.0."))
        kept = {"": True, "lower": not lower, "most": "project_q" in name}[case.frozen]
        weight.requires_grad_(kept)
    names = [canonical_name(name) for name, _ in model.named_parameters()]
    scales = {name: 0.5 if is_mup_scaled(name) else 1.0 for name in names}
    engine = make_engine(case, dist_context)
    engine.prepare(
        model,
        model.encoder.layers,
        lambda name, weight: weight.copy_(weights[name]) if name in weights else model.init_weight(name, weight, 3),
        OptimizerConfig(
            scales,
            (0.9, 0.95),
            1e-6,
            0.1,
            name=case.optimizer,
            muon_params=frozenset(name for name in scales if is_mup_scaled(name)),
            ema_decay=0.0 if case.optimizer == "adamw" else 0.5,
        ),
        replace(case.parallel_config, checkpointed_layers=1, frozen_in_compute_dtype=bool(case.adapters)),
        DynamicLossScaler(),
        canonical_name,
    )
    return engine


@contextlib.contextmanager
def broken(case: EngineCase, engine: Engine) -> Iterator[None]:
    """Takes the reduction of gradients out of an engine."""
    if case.engine == "bmtrain":
        from helpers import bmtrain_over_gloo

        with bmtrain_over_gloo.sabotage("ncclReduceScatter"):
            yield
    elif case.parallel_config.tp_size > 1:
        with unittest.mock.patch("fm9g.model.loss._VocabShard.all_reduce", lambda self, values, *_: values):
            yield
    elif case.parallel_config.zero_level == 0:
        backward = engine.backward
        engine.backward = lambda loss, is_last_micro_batch: backward(loss, False)  # type: ignore[method-assign]
        yield
    else:
        for module in engine._model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_OwnShard())
        yield


class _OwnShard(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, **_: Any) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


def train_case(
    dist_context: DistContext, case: EngineCase, first: int = 0, before: TrainResult | None = None
) -> TrainResult:
    """Trains; what came out is whole on rank 0. first: steps done before, which gave `before`."""
    engine = prepared(case, dist_context, before.weights if before else {})
    if before:
        engine.load_optimizer_state(before.optimizer if dist_context.rank == 0 else {})
        engine.load_ema_weights(before.ema if dist_context.rank == 0 else {})
    config = TrainConfig(
        config="x", train_iters=case.steps, stop_iters=case.stop, warmup_iters=0, lr=0.01, clip_grad=0.7
    )
    callbacks = RecordingCallbacks()
    loader: Any = FixedLoader(engine.dp_rank, engine.dp_size, first)
    state = TrainState(first, np.zeros(2, np.int64))
    with broken(case, engine) if case.broken else contextlib.nullcontext():
        train(config, ["even", "odd"], engine, loader, state, callbacks, StepTimer())
    # On ranks but the first the tensors are not whole, and nobody looks at them.
    weights = {name: weight.clone() for name, weight in engine.weights()}
    state_of_optimizer = {name: value.clone() for name, value in engine.optimizer_state()}
    lines = callbacks.lines
    return TrainResult(
        [line["Loss/train"] for line in lines],
        [line["Optimizer/grad_norm"] for line in lines],
        weights,
        state_of_optimizer,
        {name: value.clone() for name, value in engine.ema_weights()},
    )


def train_cases(dist_context: DistContext, cases: list[EngineCase]) -> list[TrainResult]:
    """Several runs in the same processes: starting these takes the longest."""
    return [train_case(dist_context, case) for case in cases]
