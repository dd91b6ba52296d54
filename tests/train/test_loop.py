"""The training loop: its arithmetic, the order of its events, what requests do, and when it waits."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.common import small_model
from helpers.engine_harness import CAPACITY, EngineCase, FixedLoader, RecordingCallback, documents, prepared
from torch.utils._python_dispatch import TorchDispatchMode

from fm9g.config.train import TrainConfig
from fm9g.data.load.packing import Pack, collate
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine
from fm9g.train.batch import to_batch
from fm9g.train.callback import Callback
from fm9g.train.loop import train
from fm9g.train.model_setup import setup_model_and_optimizer
from fm9g.train.state import TrainState
from fm9g.train.timer import StepTimer

STEPS = 4
EVERY = ("log", "evaluate", "save")  # the events that come every so many steps


class FixedPacksLoader:
    """A loader of the same documents, as four packs or as one four times as long."""

    is_infinite = True

    def __init__(self, packs_per_step: int) -> None:
        self.packs_per_step, self.step = packs_per_step, 0

    def next_batch(self) -> list[Pack]:
        self.step += 1
        groups = documents(self.step)
        if self.packs_per_step == 1:
            groups = [[sample for group in groups for sample in group]]
        return [collate(group, CAPACITY * 4 // self.packs_per_step) for group in groups]


def run(packs_per_step: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    config = TrainConfig(config="x", train_iters=STEPS, warmup_iters=0, lr=0.01, clip_grad=0.7)
    recorder = RecordingCallback()
    state = TrainState(0, np.zeros(2, np.int64))
    loader = FixedPacksLoader(packs_per_step)
    with DistContext("cpu") as dist_context:
        engine = FSDPEngine(dist_context, seed=0)
        setup_model_and_optimizer(engine, config, small_model(), None)
        train(config, ["even", "odd"], engine, loader, state, [recorder], StepTimer())  # type: ignore[arg-type]
        return recorder.lines, {name: weight.clone() for name, weight in engine.weights()}


def test_four_micro_batches_equal_one_large_batch() -> None:
    four, weights_four = run(4)
    one, weights_one = run(1)
    for line_four, line_one in zip(four, one):
        for key in ("Loss/train", "Loss/train/even", "Loss/train/odd", "Optimizer/grad_norm"):
            assert line_four[key] == pytest.approx(line_one[key], rel=2e-5)
    for name, weight in weights_four.items():
        torch.testing.assert_close(weight, weights_one[name], rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_all_targets_of_the_step() -> None:
    lines, _ = run(4)
    config = TrainConfig(config="x")
    total = count = 0.0
    with DistContext("cpu") as dist_context:
        engine = FSDPEngine(dist_context, seed=0)
        setup_model_and_optimizer(engine, config, small_model(), None)
        for pack in FixedPacksLoader(4).next_batch():
            batch, tasks = to_batch(pack, torch.device("cpu"))
            assert len(tasks) == len(batch.targets) == pack.target_tokens
            losses = engine.forward(batch, 0)[1]
            weights = torch.ones_like(losses) if batch.target_weights is None else batch.target_weights
            total += (losses * weights).sum().item()
            count += pack.total_weight
    assert lines[0]["Loss/train"] == pytest.approx(total / count, rel=1e-6)


class _CountHostReads(TorchDispatchMode):
    """Counts how often the host asks for a value of a tensor, which on a GPU it would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("log_iters", [1, 100])
def test_a_step_that_does_not_log_does_not_wait(log_iters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkippedStepDetector looks at norms that have come to the host by themselves, which here they have at once."""
    monkeypatch.setattr("fm9g.train.skipped_steps.SkippedStepDetector.poll", lambda *_, **__: iter(()))
    config = TrainConfig(config="x", train_iters=100, stop_iters=6, log_iters=log_iters, lr=0.01)
    looks: list[int] = []
    with DistContext("cpu") as dist_context, _CountHostReads() as mode:
        engine = prepared(EngineCase(), dist_context, {})

        class CountingCallback(Callback):
            def on_step_end(self, state: TrainState) -> None:
                looks.append(mode.count)

        loader: Any = FixedLoader(0, 1, 0)
        train(
            config,
            ["even", "odd"],
            engine,
            loader,
            TrainState(0, np.zeros(2, np.int64)),
            [CountingCallback()],
            StepTimer(),
        )
    between = np.diff(looks)
    assert (between == 0).all() if log_iters == 100 else (between > 0).all()


class EventLog(Callback):
    """Writes down the events of each step, and makes requests: step -> event -> field of state.control."""

    def __init__(self, requests: dict[tuple[int, str], str] | None = None) -> None:
        self.events: list[str] = []
        self.requests = requests or {}

    def _note(self, event: str, state: TrainState) -> None:
        self.events.append(f"{event} {state.step}")
        if (state.step, event) in self.requests:
            setattr(state.control, self.requests[state.step, event], True)

    def on_step_begin(self, state: TrainState) -> None:
        self._note("begin", state)

    def on_before_optimizer_step(self, state: TrainState) -> None:
        self._note("optimizer", state)

    def on_step_end(self, state: TrainState) -> None:
        self._note("end", state)

    def on_log(self, state: TrainState, metrics: dict[str, float]) -> None:
        self._note("log", state)

    def on_evaluate(self, state: TrainState) -> None:
        self._note("evaluate", state)

    def on_save(self, state: TrainState) -> None:
        self._note("save", state)


def events_of(requests: dict[tuple[int, str], str], **keys: object) -> list[str]:
    values: dict = {"train_iters": 3, "log_iters": 100, "save_iters": 100, "eval_iters": 100, "warmup_iters": 0, **keys}
    log = EventLog(requests)
    loader: Any = FixedLoader(0, 1, 0)
    with DistContext("cpu") as dist_context:
        engine = prepared(EngineCase(), dist_context, {})
        state = TrainState(0, np.zeros(2, np.int64))
        train(TrainConfig(config="x", **values), ["even", "odd"], engine, loader, state, [log, Callback()], StepTimer())
    return log.events


def test_events_come_in_order() -> None:
    steps = [f"{event} {step + (event != 'begin')}" for step in range(3) for event in ("begin", "optimizer", "end")]
    assert events_of({}) == [*steps, "log 3", "save 3"]
    with_validation = events_of({}, val_dataset="v", eval_iters=2, log_iters=2, save_iters=2)
    after_two = ["log 2", "evaluate 2", "save 2"]
    assert with_validation == [*steps[:6], *after_two, *steps[6:], "log 3", "evaluate 3", "save 3"]


def test_intervals_below_one_are_fractions_of_the_run_rounded_up() -> None:
    fractions = {"log_iters": 0.5, "save_iters": 0.34, "eval_iters": 0.01}  # of three steps: 2, 2, 1
    events = [event for event in events_of({}, val_dataset="v", **fractions) if event.split()[0] in EVERY]
    assert events == ["evaluate 1", "log 2", "evaluate 2", "save 2", "log 3", "evaluate 3", "save 3"]


def test_a_request_to_save_is_served_after_the_step_and_once() -> None:
    events = events_of({(1, "begin"): "should_save"})
    assert [event for event in events if event.startswith("save")] == ["save 2", "save 3"]


def test_a_request_to_stop_ends_the_run_with_a_log_line_and_a_checkpoint() -> None:
    events = events_of({(1, "begin"): "should_stop"}, val_dataset="v")
    assert events[-3:] == ["end 2", "log 2", "save 2"]  # no evaluation: a signal should stop soon
    events = events_of({(2, "evaluate"): "should_stop"}, val_dataset="v", eval_iters=2)
    assert events[-4:] == ["end 2", "evaluate 2", "log 2", "save 2"]
