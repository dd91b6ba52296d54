"""A rehearsal of the GPU without one: whole steps on tensors of tests/fake_gpu.py, which have a device and no values.

It fails where tensors of two devices meet, and where the host waits for the GPU in a step that does not log.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import engine_runs
import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_runs import Setup
from fake_gpu import FakeGPU, fake_gpu, with_values
from ranks import run_ranks
from support import ROOT
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from fm9g.config.train import TrainConfig
from fm9g.data.pack import collate
from fm9g.engine.base import Engine, LossScale, Placement
from fm9g.engine.processes import Processes
from fm9g.model import transformer
from fm9g.train.clock import Clock
from fm9g.train.evaluate import Evaluation
from fm9g.train.loop import TrainState, train

BF16 = Placement(dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """gpus: of the run, this process has the first. broken: what is put into the model; see breakages."""

    setup: Setup
    gpus: int = 2
    loss_scale: float = 0.0
    broken: str = ""


@dataclass
class Seen:
    """The places where the host waited: in steps that did not log, in logging, in the evaluation."""

    steps: list[str] = field(default_factory=list)
    logging: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)


class Watching(engine_runs.Figures):
    """A desk that keeps where the host waited until it was asked."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu, self.seen = gpu, Seen()

    def stepped(self) -> None:
        self.seen.steps += self.gpu.take()

    def log(self, figures: dict[str, float], clock: Clock) -> None:
        super().log(figures, clock)
        self.seen.logging += self.gpu.take()


def rehearse(outside: Processes, case: Case) -> Seen:
    """Two steps, the second logs; then an evaluation."""
    config = TrainConfig(config="x", train_iters=2, warmup_iters=0, lr=0.01, clip_grad=0.7, log_iters=2)
    dist.destroy_process_group()
    scale = LossScale(case.loss_scale, 5) if case.loss_scale else LossScale()
    with fake_gpu(case.gpus) as (gpu, processes), broken(case.broken):
        built = {name: with_values(getattr(engine_runs, name)) for name in ("FM9G", "inject", "quantize_layers")}
        with mock.patch.multiple(engine_runs, LossScale=lambda: scale, **built), empty_on_gpu():
            engine = engine_runs.prepared(case.setup, processes, {})
        gpu.take()
        desk, loader = Watching(gpu), engine_runs.Dealt(engine.replica, engine.replicas, 0)
        train(config, ["even", "odd"], engine, loader, TrainState(0, np.zeros(2, np.int64)), desk, Clock())  # type: ignore[arg-type]
        assert len(desk.lines) == 1
        gpu.take()
        evaluation(engine).run()
        desk.seen.evaluation += gpu.take()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # which the caller ends
    return desk.seen


@contextlib.contextmanager
def empty_on_gpu() -> Iterator[None]:
    """Models that an engine is to place are on the GPU, and no longer on "meta", which this mode takes for a GPU."""
    prepare = Engine.prepare

    def prepared(self: Engine, model: torch.nn.Module, *others: Any) -> None:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                values = torch.empty(weight.shape, device="cuda")
                setattr(module, name, torch.nn.Parameter(values, weight.requires_grad))
        prepare(self, model, *others)

    with mock.patch.object(Engine, "prepare", prepared):
        yield


def evaluation(engine: Engine) -> Evaluation:
    made = Evaluation.__new__(Evaluation)
    rows = [collate(group, engine_runs.CAPACITY) for group in engine_runs.documents(0)]
    made._engine, made._tasks, made._rows = engine, ["even", "odd"], rows
    return made


@contextlib.contextmanager
def broken(how: str) -> Iterator[None]:
    """Within it the model does what it must not: it waits in each attention, or has a tensor on the host."""
    attend = transformer.attend

    def waits(query: torch.Tensor, *others: Any) -> torch.Tensor:
        assert query.isfinite().all()
        return attend(query, *others)

    def mixes(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return attend(query * torch.ones(len(query), 1, 1), *others)

    with mock.patch.object(transformer, "attend", {"": attend, "waits": waits, "mixes": mixes}[how]):
        yield


def seen(case: Case) -> Seen:
    return run_ranks(1, rehearse, case)[0]


QUICK = {
    "bf16": Case(Setup(placement=BF16)),
    "full": Case(Setup(placement=replace(BF16, checkpointing="full"), model=(("tie_word_embeddings", True),))),
    "nf4": Case(Setup(placement=BF16, adapters="nf4")),
}
SLOW = {
    "fp32": Case(Setup()),
    "without a kernel": Case(Setup(placement=BF16, model=(("use_flash_attn", False),))),
    "alone": Case(Setup(placement=BF16), gpus=1),
    "selective": Case(Setup(placement=replace(BF16, checkpointing="selective", zero_level=2))),
    "copies": Case(Setup(placement=replace(BF16, zero_level=0))),
    "tp": Case(Setup(placement=replace(BF16, tp_size=2)), gpus=4),
    "tp without sp": Case(Setup(placement=replace(BF16, tp_size=2, sequence_parallel=False)), gpus=4),
    "dropout": Case(Setup(placement=BF16, model=(("dropout", 0.1), ("qk_norm", True)))),
    "windows": Case(Setup(placement=BF16, model=(("sliding_window", 4), ("rope_scaling", "dynamic ntk")))),
    "frozen": Case(Setup(placement=BF16, frozen="lower")),
    "peft": Case(Setup(placement=BF16, adapters="peft")),
    "dora": Case(Setup(placement=BF16, adapters="dora")),
}
OPTIMIZER, NORM, RULES = "fm9g/engine/optimizer.py", "fm9g/engine/base.py", "fm9g/engine/rules.py"
WAITING = {  # what CONTRIBUTING.md says of: where a step waits, and how often
    "fp16": (Case(Setup(placement=replace(BF16, dtype=torch.float16)), loss_scale=1024.0), {NORM: 1}),
    "offload": (Case(Setup(placement=replace(BF16, offload=True))), {NORM: 1, OPTIMIZER: 1}),
    "muon": (Case(Setup(placement=BF16, optimizer="muon")), {NORM: 1}),
    "adamw8bit": (Case(Setup(placement=BF16, optimizer="adamw8bit")), {NORM: 1, RULES: 1}),
    "adafactor": (Case(Setup(placement=BF16, optimizer="adafactor")), {NORM: 1, RULES: None}),  # each weight, in torch
}


def slow(names: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*QUICK, *slow(SLOW)])
def test_a_step_that_does_not_log_waits_for_nothing(name: str) -> None:
    found = seen((QUICK | SLOW)[name])
    assert found.steps == []
    # The one that logs waits for the norms, then for the losses of all processes.
    assert {place(wait) for wait in found.logging} == {"fm9g/train/bad.py", "fm9g/train/loop.py"}
    assert {place(wait) for wait in found.evaluation} == {"fm9g/train/evaluate.py"}


@pytest.mark.parametrize("name", slow(WAITING))
def test_where_a_step_must_wait_it_waits_as_often_as_is_known(name: str) -> None:
    case, known = WAITING[name]
    counts = Counter(place(wait) for wait in seen(case).steps)
    assert counts.keys() == known.keys()
    assert all(counts[file] == 2 * count for file, count in known.items() if count)  # two steps


def place(wait: str) -> str:
    """The file of a wait, from the repository on."""
    return str(Path(wait.rpartition(" at ")[2].rpartition(":")[0]).relative_to(ROOT))


def test_a_wait_hidden_in_a_model_is_seen() -> None:
    found = seen(Case(Setup(placement=BF16), broken="waits"))
    assert len(found.steps) == 2 * 2 * 2  # steps, micro-batches, layers
    assert {place(wait) for wait in found.steps} == {"tests/engine/test_rehearsal.py"}


def test_a_tensor_left_on_the_host_is_seen() -> None:
    with pytest.raises(AssertionError, match="found at least two devices, cuda:0 and cpu"):
        seen(Case(Setup(placement=BF16), broken="mixes"))


def small_waits(outside: Processes) -> dict[str, bool]:
    """What was done -> whether it was seen to wait."""
    dist.destroy_process_group()
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
        found = {}
        for name, action in done.items():
            gpu.take()
            try:
                action()
            except DynamicOutputShapeException:  # a result whose shape the host must know
                gpu.waits.append(name)
            found[name] = bool(gpu.take())
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    return found


def test_every_way_to_wait_is_seen_and_nothing_else() -> None:
    (found,) = run_ranks(1, small_waits)
    harmless = {"copy_ to pinned memory", "from pinned memory", "event that is past"}
    assert {name for name, waited in found.items() if not waited} == harmless
