"""A small training run on any engine and number of processes, from documents that are the same for all of them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
from fm9g.data.load.loader import trimmed_length
from fm9g.data.load.packing import Pack, Sample, collate
from fm9g.engine.base import Engine, ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.gradients import DynamicLossScaler
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.lora.inject import canonical_name, inject_adapters
from fm9g.lora.quantize import quantize_layers
from fm9g.model.transformer import FM9G, is_mup_scaled
from fm9g.train.callback import Callback
from fm9g.train.loop import train
from fm9g.train.state import TrainState
from fm9g.train.timer import StepTimer

CAPACITY, PACKS = 32, 4  # tokens per micro-batch; micro-batches per step over all processes


needs_bmtrain = pytest.mark.skipif(
    importlib.util.find_spec("bmtrain") is None, reason="bmtrain has wheels for Python 3.10 and 3.11 alone"
)


@dataclass(frozen=True)
class EngineCase:
    """A training run.

    Args:
        engine: torch or bmtrain.
        stop: a step before the last one, at which the run ends; 0: none.
        frozen: which weights are not trained: "", lower or most.
        adapters: peft, opendelta, dora, nf4, or modules (with modules_to_save), and only they are trained; "": none.
        broken: every process keeps its own gradients, without a reduction.
        optimizer: other optimizers than adamw also keep running means of weights.
        loss_scaler: arguments of DynamicLossScaler.
        repeat_documents: every step sees the same documents.
        packing: False: rows are as long as their documents, and every second step leaves the second of two replicas
            without a document, as the end of an epoch does.
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
    loss_scaler: tuple[float, int] = (1.0, 0)
    repeat_documents: bool = False
    packing: bool = True


@dataclass
class TrainResult:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] = field(default_factory=dict)


MakeEngine = Callable[[EngineCase, DistContext], Engine]


def documents(step: int) -> list[list[Sample]]:
    """Four groups of documents of unequal length, each fitting in one row, with masked inputs of unequal share."""
    rng = np.random.default_rng(step)
    groups = []
    for lengths in ([30], [3, 20, 5], [1, 1], [16, 14]):
        group = []
        for length in lengths:
            ids = rng.integers(0, 320, length)
            tokens = np.append(ids, ids[:1]).astype(np.int32)
            num_masked = rng.integers(0, length)
            weights = np.where(np.arange(length + 1) > num_masked, 1.0, 0.0)
            if length % 3 == 0:  # some documents count less
                weights[num_masked + 1 :: 2] = 0.25
            tokens = make_token_array(tokens, weights)
            group.append(Sample(tokens, dataset=length % 2, sample_index=0, segment=0))
        groups.append(group)
    return groups


class FixedLoader:
    """A loader of the same documents for all, dealt to the replicas as fm9g.data.load.loader deals streams."""

    is_infinite = True

    def __init__(self, dp_rank: int, dp_size: int, step: int, case: EngineCase = EngineCase()) -> None:
        self.dp_rank, self.dp_size, self.step, self.case = dp_rank, dp_size, step, case

    def next_batch(self) -> list[Pack]:
        self.step += 1
        groups = documents(0 if self.case.repeat_documents else self.step)
        if self.case.packing:
            lengths = [CAPACITY] * PACKS
        else:
            groups = [[] if self.step % 2 == 0 and number % 2 else group for number, group in enumerate(groups)]
            lengths = [trimmed_length(sum(sample.length for sample in group), 2) for group in groups]
        packs = [collate(group, length) for group, length in zip(groups, lengths)]
        return packs[self.dp_rank :: self.dp_size]


class RecordingCallback(Callback):
    """Keeps the metrics of each step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.lines.append(metrics)


def make_cpu_engine(case: EngineCase, dist_context: DistContext) -> Engine:
    """The engine of a case, with bmtrain's compiled part replaced by gloo."""
    if case.engine == "bmtrain":
        from tools import bmtrain_over_gloo

        bmtrain_over_gloo.install()
        from fm9g.engine.bmtrain import BMTrainEngine

        return BMTrainEngine(dist_context, seed=7)
    from fm9g.engine.fsdp import FSDPEngine

    return FSDPEngine(dist_context, seed=7)


def prepared(
    case: EngineCase,
    dist_context: DistContext,
    weights: dict[str, torch.Tensor],
    make_engine: MakeEngine = make_cpu_engine,
) -> Engine:
    """An engine with a small model. weights: initial values; those that are missing are random."""
    config = small_model(**dict(case.model))
    with torch.device("meta"):
        model = FM9G(config)
    if case.adapters:
        if case.adapters == "nf4":
            quantize_layers(model.encoder.layers, "nf4", double_quant=True)
        adapter_config = AdapterConfig(
            r=3,
            alpha=6.0,
            layers=["project_q", "w_1", "w_out"],
            dora=case.adapters == "dora",
            modules_to_save=["input_embedding", "lm_head"] if case.adapters == "modules" else [],
        )
        inject_adapters(
            model, model.encoder.layers, adapter_config, "opendelta" if case.adapters == "opendelta" else "peft"
        )
    for name, weight in model.named_parameters() if not case.adapters else ():
        is_lower = name.startswith(("input_embedding", "encoder.layers.0."))
        is_trained = {"": True, "lower": not is_lower, "most": "project_q" in name}[case.frozen]
        weight.requires_grad_(is_trained)
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
        DynamicLossScaler(*case.loss_scaler),
        canonical_name,
    )
    return engine


@contextlib.contextmanager
def broken(case: EngineCase, engine: Engine) -> Iterator[None]:
    """Within the block, an engine does not reduce gradients."""
    if case.engine == "bmtrain":
        from tools import bmtrain_over_gloo

        with bmtrain_over_gloo.sabotage("ncclReduceScatter"):
            yield
    elif case.parallel_config.tp_size > 1:
        vocab_shard: Any = engine.model.vocab_shard
        vocab_shard.all_reduce_sum = lambda values: values
        yield
    elif case.parallel_config.zero_level == 0:
        backward = engine.backward
        engine.backward = lambda loss, is_last_micro_batch: backward(loss, False)  # type: ignore[method-assign]
        yield
    else:
        for module in engine.model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(_OwnShard())
        yield


class _OwnShard(ReduceScatter):
    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, **_: Any) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


def train_case(
    dist_context: DistContext,
    case: EngineCase,
    first: int = 0,
    before: TrainResult | None = None,
    make_engine: MakeEngine = make_cpu_engine,
) -> TrainResult:
    """Trains; the tensors of the result are complete on rank 0 alone.

    Args:
        first: number of steps of an earlier run, whose result is `before`.
    """
    engine = prepared(case, dist_context, before.weights if before else {}, make_engine)
    if before:
        engine.load_optimizer_state(before.optimizer if dist_context.rank == 0 else {})
        engine.load_ema_weights(before.ema if dist_context.rank == 0 else {})
    config = TrainConfig(
        config="x", train_iters=case.steps, stop_iters=case.stop, warmup_iters=0, lr=0.01, clip_grad=0.7
    )
    recorder = RecordingCallback()
    loader: Any = FixedLoader(engine.dp_rank, engine.dp_size, first, case)
    state = TrainState(first, np.zeros(2, np.int64))
    with broken(case, engine) if case.broken else contextlib.nullcontext():
        train(config, ["even", "odd"], engine, loader, state, [recorder], StepTimer())
    weights = {name: weight.clone() for name, weight in engine.weights()}
    optimizer = {name: value.clone() for name, value in engine.optimizer_state()}
    ema = {name: value.clone() for name, value in engine.ema_weights()}
    lines = recorder.lines
    return TrainResult(
        [line["Loss/train"] for line in lines],
        [line["Optimizer/grad_norm"] for line in lines],
        weights,
        optimizer,
        ema,
    )


def train_cases(dist_context: DistContext, cases: list[EngineCase]) -> list[TrainResult]:
    """Several runs in the same processes, whose start takes longest."""
    return [train_case(dist_context, case) for case in cases]
