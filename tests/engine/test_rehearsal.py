"""A rehearsal of a GPU without one: full steps on tensors with a device but no values (helpers/fake_gpu.py).

It fails if tensors of two devices meet, or if the host waits for the GPU in a step that does not log.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import bmtrain_on_fake_gpu, engine_harness
from helpers.common import ROOT, small_model
from helpers.fake_gpu import FakeGPU, fake_gpu, with_values
from helpers.spawn import run_ranks
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig
from fm9g.data.load.packing import collate
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.io.lazy_tensor import LazyTensor
from fm9g.model import transformer
from fm9g.model.transformer import FM9G, weight_shapes
from fm9g.train import model_setup
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.evaluator import Evaluator
from fm9g.train.loop import train
from fm9g.train.model_setup import engine_name, make_engine, setup_model_and_optimizer
from fm9g.train.state import TrainState
from fm9g.train.timer import StepTimer

BMTRAIN = {"engine": "bmtrain"}
EMA = {"ema_decay": 0.5}
LOWER = "input_embedding.*,encoder.layers.0.*"
LORA = {"lora_layer": ["project_q", "w_1", "w_out"], "lora_r": 3}


@dataclass(frozen=True)
class Case:
    """A rehearsal.

    Args:
        keys, model: keys of the training and of the model configuration.
        gpus: number of processes, each with a GPU; this process is the first.
        broken: a fault of the model, see the function of that name.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    gpus: int = 2
    broken: str = ""


@dataclass
class Seen:
    """Places where the host waited: in steps that did not log, in logging, in the evaluation."""

    steps: list[str] = field(default_factory=list)
    logging: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)


class WatchingCallback(engine_harness.RecordingCallback):
    """Also records where the host waited since the event before."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu, self.seen = gpu, Seen()

    def on_step_end(self, state: TrainState) -> None:
        self.seen.steps += self.gpu.take()

    def on_log(self, state: TrainState, metrics: dict[str, float]) -> None:
        super().on_log(state, metrics)
        self.seen.logging += self.gpu.take()


def rehearse(outside: DistContext, case: Case) -> Seen:
    """Two steps, the second logs; then an evaluation."""
    defaults = {"engine": "torch", "clip_grad": 0.7, "grad_ckpt_num": 1}
    steps = {"train_iters": 2, "warmup_iters": 0, "log_iters": 2}
    model = small_model(**{"half_type": "bf16", **case.model})
    with tempfile.TemporaryDirectory() as folder:
        base = {"pretrained_model": write_weights(model, Path(folder))} if "lora_layer" in case.keys else {}
        config = TrainConfig(config="x", **{**defaults, **steps, **base, **case.keys})
        with fake_gpu(case.gpus) as (gpu, dist_context), broken(case.broken):
            if engine_name(config) == "bmtrain":
                bmtrain_on_fake_gpu.install()
            engine = make_engine(config, dist_context)
            with built_of_values():
                setup_model_and_optimizer(engine, config, model, None)
            gpu.take()
            watcher, loader = WatchingCallback(gpu), engine_harness.FixedLoader(engine.dp_rank, engine.dp_size, 0)
            train(config, ["even", "odd"], engine, loader, TrainState(0, np.zeros(2, np.int64)), [watcher], StepTimer())  # type: ignore[arg-type]
            assert len(watcher.lines) == 1
            gpu.take()
            make_evaluator(engine).run()
            watcher.seen.evaluation += gpu.take()
    return watcher.seen


def write_weights(config: ModelConfig, folder: Path) -> str:
    """Writes a file of random weights of a model, and returns its path."""
    file = folder / "base.pt"
    torch.save(FM9G(config).state_dict(), file)
    return str(file)


@contextlib.contextmanager
def built_of_values() -> Iterator[None]:
    """Within the block, tensors read from files have values, and models are on "meta" until an engine gets them.

    Then their parameters become fake tensors on the GPU. Created under the fake mode, they would be there from the
    start.
    """
    prepare = Engine.prepare

    def prepared(self: Engine, model: torch.nn.Module, *others: Any) -> None:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                values = torch.empty(weight.shape, device="cuda")
                setattr(module, name, torch.nn.Parameter(values, weight.requires_grad))
        prepare(self, model, *others)

    adapter_training = {name: with_values(getattr(AdapterTraining, name)) for name in ("__init__", "load_base")}
    with (
        mock.patch.multiple(model_setup, FM9G=with_values(FM9G), weight_shapes=with_values(weight_shapes)),
        mock.patch.multiple(AdapterTraining, **adapter_training),
        mock.patch.object(LazyTensor, "read", with_values(LazyTensor.read)),
        mock.patch.object(Engine, "prepare", prepared),
    ):
        yield


def make_evaluator(engine: Engine) -> Evaluator:
    evaluator = Evaluator.__new__(Evaluator)
    packs = [collate(group, engine_harness.CAPACITY) for group in engine_harness.documents(0)]
    evaluator._engine, evaluator._tasks, evaluator._packs = engine, ["even", "odd"], packs
    return evaluator


@contextlib.contextmanager
def broken(fault: str) -> Iterator[None]:
    """Within the block the model has a fault: it waits in each attention, or has a tensor on the host."""
    varlen_attention = transformer.varlen_attention

    def waits(query: torch.Tensor, *others: Any) -> torch.Tensor:
        assert query.isfinite().all()
        return varlen_attention(query, *others)

    def mixes(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return varlen_attention(query * torch.ones(len(query), 1, 1), *others)

    with mock.patch.object(
        transformer, "varlen_attention", {"": varlen_attention, "waits": waits, "mixes": mixes}[fault]
    ):
        yield


def seen(case: Case) -> Seen:
    return run_ranks(1, rehearse, case)[0]


QUICK = {
    "full": Case({"activation_checkpoint": "full"}, {"tie_word_embeddings": True}),
    "nf4": Case({**LORA, "quantization": "nf4"}),
}
SLOW = {
    "bf16": Case(),
    "fp32": Case(model={"half_type": "fp32"}),
    "without a kernel": Case({"flash": "none"}),
    "alone": Case(gpus=1),
    "selective": Case({"activation_checkpoint": "selective", "zero_level": 2}),
    "copies": Case({"zero_level": 0, **EMA}),
    "tp": Case({"tp_size": 2}, gpus=4),
    "tp without sp": Case({"tp_size": 2, "sequence_parallel": False}, gpus=4),
    "dropout": Case(model={"dropout": 0.1, "qk_norm": True}),
    "windows": Case(model={"sliding_window": 4, "rope_scaling": "dynamic ntk"}),
    "frozen": Case({"freeze": LOWER}),
    "sgd": Case({"optimizer": "sgd", "sgd_momentum": 0.9, **EMA}),
    "last layer": Case({"trainable_layers": 1}),
    "peft": Case(LORA),
    "dora": Case({**LORA, "use_dora": True}),
}
# Waits for the norms, then for the losses of all processes.
LOGGING = {"fm9g/train/skipped_steps.py", "fm9g/train/loop.py"}
# The exceptions: where the host waits in two steps of two micro-batches, and how often. See CONTRIBUTING.md.
NORM, OPTIMIZER, PARAM_OPTIMIZERS = (
    "fm9g/engine/base.py",
    "fm9g/engine/sharded_optimizer.py",
    "fm9g/engine/optimizers.py",
)
WAITING = {
    "fp16": (Case({"loss_scale": 1024.0}, {"half_type": "fp16"}), {NORM: 2}),
    "offload": (Case({"offload_optimizer": True, **EMA}), {NORM: 2, OPTIMIZER: 2}),
    "muon": (Case({"optimizer": "muon", **EMA}), {NORM: 2}),
    "adamw8bit": (Case({"optimizer": "adamw8bit", **EMA}), {NORM: 2, PARAM_OPTIMIZERS: 2}),
    "adafactor": (
        Case({"optimizer": "adafactor", **EMA}),
        {NORM: 2, PARAM_OPTIMIZERS: 2 * 3 * 21},
    ),  # 21 weights, in torch
}
# bmtrain waits before each of the two layers, forward and backward, except before the very first.
LAYERS = "bmtrain/synchronize.py"
BMTRAIN_QUICK = {
    "bmtrain": (Case({"engine": "auto", "zero_level": 2, "activation_checkpoint": "full"}), {LAYERS: 15}),
}
BMTRAIN_SLOW = {
    "bmtrain zero 3": (Case(BMTRAIN), {LAYERS: 15}),
    "bmtrain zero 3 full": (Case({**BMTRAIN, "activation_checkpoint": "full"}), {LAYERS: 15}),
    "bmtrain zero 2": (Case({**BMTRAIN, "zero_level": 2}), {LAYERS: 15}),
    "bmtrain selective": (Case({**BMTRAIN, "activation_checkpoint": "selective"}), {LAYERS: 15}),
    "bmtrain fp32": (Case(BMTRAIN, {"half_type": "fp32", "tie_word_embeddings": True}), {LAYERS: 15}),
    "bmtrain fp16": (Case({**BMTRAIN, "loss_scale": 1024.0}, {"half_type": "fp16"}), {LAYERS: 14, NORM: 2}),
    "bmtrain alone": (Case(BMTRAIN, gpus=1), {LAYERS: 31}),  # computes all four micro-batches
    "bmtrain frozen": (Case({**BMTRAIN, "freeze": LOWER}), {LAYERS: 11}),  # one layer has no backward pass
    "bmtrain frozen zero 2": (Case({**BMTRAIN, "freeze": LOWER, "zero_level": 2}), {LAYERS: 11}),
    "bmtrain peft": (Case({**BMTRAIN, **LORA}), {LAYERS: 15}),
    "bmtrain nf4": (Case({**BMTRAIN, **LORA, "quantization": "nf4"}), {LAYERS: 15}),
    "bmtrain muon": (Case({**BMTRAIN, "optimizer": "muon"}), {LAYERS: 14, NORM: 2}),
    "bmtrain offload": (Case({**BMTRAIN, "offload_optimizer": True}), {LAYERS: 14, NORM: 2, OPTIMIZER: 2}),
}


def params(names: Any, *marks: Any) -> list[Any]:
    return [pytest.param(name, marks=marks) for name in names]


@pytest.mark.parametrize("name", [*params(QUICK), *params(SLOW, pytest.mark.slow)])
def test_a_step_that_does_not_log_waits_for_nothing(name: str) -> None:
    waits = seen((QUICK | SLOW)[name])
    assert waits.steps == []
    assert places(waits.logging) == LOGGING
    assert places(waits.evaluation) == {"fm9g/train/evaluator.py"}


@pytest.mark.parametrize(
    "name",
    [
        *params(WAITING, pytest.mark.slow),
        *params(BMTRAIN_QUICK, engine_harness.needs_bmtrain),
        *params(BMTRAIN_SLOW, engine_harness.needs_bmtrain, pytest.mark.slow),
    ],
)
def test_a_step_that_must_wait_waits_as_often_as_documented(name: str) -> None:
    case, known = (WAITING | BMTRAIN_QUICK | BMTRAIN_SLOW)[name]
    waits = seen(case)
    assert Counter(map(place, waits.steps)) == known
    assert places(waits.logging) == LOGGING
    assert places(waits.evaluation) == {"fm9g/train/evaluator.py"} | known.keys() & {LAYERS}


def places(waits: list[str]) -> set[str]:
    return set(map(place, waits))


def place(wait: str) -> str:
    """The file of a wait, relative to the repository or to site-packages."""
    path = Path(wait.rpartition(" at ")[2].rpartition(":")[0])
    *_, packages = [parent for parent in path.parents if parent.name == "site-packages"] or [ROOT]
    return str(path.relative_to(packages))


def test_a_wait_hidden_in_a_model_is_seen() -> None:
    waits = seen(Case(broken="waits"))
    assert len(waits.steps) == 2 * 2 * 2  # steps, micro-batches, layers
    assert places(waits.steps) == {"tests/engine/test_rehearsal.py"}


def test_a_tensor_left_on_the_host_is_seen() -> None:
    with pytest.raises(AssertionError, match="found at least two devices, cuda:0 and cpu"):
        seen(Case(broken="mixes"))


def host_message(outside: DistContext) -> None:
    with fake_gpu(2):
        bmtrain_on_fake_gpu.install()
        engine = make_engine(TrainConfig(config="x", engine="bmtrain"), outside)
        engine.dp_sum(torch.ones(4, device="cuda"))
        engine.dp_sum(torch.ones(4))


@engine_harness.needs_bmtrain
def test_a_message_of_bmtrain_from_the_host_is_seen() -> None:
    with pytest.raises(AssertionError, match=r"assert src\.is_cuda"):
        run_ranks(1, host_message)


def small_waits(outside: DistContext) -> dict[str, bool]:
    """Action -> whether the fake GPU saw the host wait."""
    with fake_gpu() as (gpu, _):
        x = torch.ones(4, device="cuda:0")
        event = torch.cuda.Event()
        event.record()
        pinned = torch.empty(4, pin_memory=True)
        done = {
            "item": lambda: x.sum().item(),
            "bool": lambda: bool(x.isnan().any()),
            "tolist": lambda: (x + 1).tolist(),
            "cpu": lambda: (x + 1).cpu(),
            "to cpu": lambda: (x + 1).to("cpu"),
            "copy_": lambda: torch.empty(4).copy_(x + 1),
            "copy_ to pageable memory": lambda: torch.empty(4).copy_(x + 1, non_blocking=True),
            "copy_ to pinned memory": lambda: pinned.copy_(x + 1, non_blocking=True),
            "tensor": lambda: torch.tensor([1.0], device="cuda:0"),
            "from pinned memory": lambda: pinned.to("cuda:0", non_blocking=True),
            "mask": lambda: (x + 1).index_put_((x > 0,), x),
            "nonzero": lambda: x.nonzero(),
            "masked_select": lambda: x[x > 0],
            "synchronize": lambda: (x + 1, torch.cuda.synchronize()),
            "stream": lambda: (x + 1, torch.cuda.current_stream().synchronize()),
            "event": lambda: (x + 1, event.record(), event.synchronize()),
            "event that is past": event.synchronize,
        }
        has_waited = {}
        for name, action in done.items():
            gpu.take()
            try:
                action()
            except DynamicOutputShapeException:  # a result whose shape the host must know
                gpu.waits.append(name)
            has_waited[name] = bool(gpu.take())
    return has_waited


def test_every_way_to_wait_is_seen_and_nothing_else() -> None:
    (has_waited,) = run_ranks(1, small_waits)
    harmless = {"copy_ to pinned memory", "from pinned memory", "event that is past"}
    assert {name for name, waited in has_waited.items() if not waited} == harmless
