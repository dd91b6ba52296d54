"""The callbacks of a run, each alone, with stand-ins for what it calls."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.common import small_model
from helpers.engine_harness import CAPACITY, documents

from fm9g.data.load.packing import Pack, collate
from fm9g.run_files import read_events, read_metrics
from fm9g.train.callback import Callback, CallbackList
from fm9g.train.callbacks import EvalCallback, HeartbeatCallback, MetricsCallback, SignalCallback, SkippedBatchDump
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.skipped_steps import SkippedStep
from fm9g.train.state import TrainState
from fm9g.train.throughput import FlopsModel
from fm9g.train.timer import StepTimer


def make_state(step: int = 0) -> TrainState:
    return TrainState(step, np.zeros(2, np.int64))


def make_packs() -> list[Pack]:
    return [collate(group, CAPACITY) for group in documents(1)]


MIXTURE: Any = SimpleNamespace(
    configs=[SimpleNamespace(task_name="even"), SimpleNamespace(task_name="odd")],
    datasets=[range(10), range(20)],
    tokenizer=SimpleNamespace(decode=lambda ids: f"{len(ids)} tokens"),
)


def test_a_list_calls_each_callback_at_each_event_in_order() -> None:
    calls: list[tuple[str, str]] = []

    class Recorder(Callback):
        def __init__(self, name: str) -> None:
            for event in (name for name in dir(Callback) if name.startswith("on_")):
                setattr(self, event, lambda *_, event=event, name=name: calls.append((event, name)))

    both = CallbackList([Recorder("first"), Recorder("second")])
    events = [name for name in dir(Callback) if name.startswith("on_")]
    for event in events:
        extra = [{}] if event in ("on_log", "on_step_skipped") else []
        getattr(both, event)(make_state(), *extra)
    assert calls == [(event, name) for event in events for name in ("first", "second")]
    assert len(events) == 7


def test_the_watchdog_hears_what_the_run_is_doing() -> None:
    reports: list[tuple[Any, ...]] = []
    callback = HeartbeatCallback(SimpleNamespace(report_progress=lambda *given: reports.append(given)))  # type: ignore[arg-type]
    callback.on_step_begin(make_state(3))
    callback.on_evaluate(make_state(4))
    callback.on_save(make_state(4))
    assert reports == [(3,), (4, "evaluating"), (4, "saving")]


def test_signals_become_requests_and_a_request_to_save_ends_with_the_save() -> None:
    handler: Any = SimpleNamespace(stop_requested=False, save_requested=True)
    callback, state = SignalCallback(handler), make_state()
    callback.on_step_begin(state)
    assert (state.control.should_stop, state.control.should_save) == (False, True)
    callback.on_save(state)
    assert not handler.save_requested
    handler.stop_requested = True
    callback.on_step_begin(state)
    assert state.control.should_stop


def evaluate(losses: Iterable[float], patience: int, metrics_logger: MetricsLogger | None = None) -> TrainState:
    """The state after evaluations with these losses, or after the one that asks to stop."""
    remaining = iter(losses)
    evaluator: Any = SimpleNamespace(run=lambda: {"Loss/val": next(remaining)})
    callback, state = EvalCallback(evaluator, patience, metrics_logger), make_state()
    for _ in losses:
        state.step += 1
        callback.on_evaluate(state)
        if state.control.should_stop:
            break
    return state


def test_evaluations_without_improvement_end_the_run(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, [], 0, 9) as metrics_logger:
        state = evaluate([3.0, 2.0, 2.0, float("nan"), 1.0], 2, metrics_logger)
    assert (state.step, state.best_val_loss, state.evals_since_best) == (4, 2.0, 2)
    assert state.val_loss is None  # of step 4, where it was not finite
    events = [(event["step"], event["kind"]) for event in read_events(tmp_path / "events.jsonl")]
    assert events == [(1, "best"), (2, "best"), (4, "early_stop")]
    assert [line["Loss/val"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 2.0, 2.0, None]


def test_without_patience_and_on_other_ranks_evaluations_end_nothing() -> None:
    assert evaluate([1.0, *[2.0] * 9], 0).step == 10
    assert evaluate([1.0, *[2.0] * 9], 3).step == 4  # other ranks have no metrics logger, and stop all the same


@pytest.mark.parametrize("oom", [False, True])
def test_a_skipped_batch_is_written_with_its_text(tmp_path: Path, oom: bool) -> None:
    packs = make_packs()
    with MetricsLogger(tmp_path, [], 0, 9) as metrics_logger:
        dump = SkippedBatchDump(tmp_path, MIXTURE, 1, metrics_logger, max_files=1)
        for step in (5, 6):
            dump.on_step_skipped(make_state(7), SkippedStep(step, packs, "the reason", oom))
    (file,) = (tmp_path / "bad_batches").iterdir()  # max_files
    assert file.name == "step-5.rank-1.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["row"], line["task"], line["text"]) for line in lines][:2] == [
        (0, "even", "30 tokens"),
        (1, "odd", "3 tokens"),
    ]
    assert sum(len(line["input_ids"]) for line in lines) == sum(pack.tokens for pack in packs)
    first, second = read_events(tmp_path / "events.jsonl")
    assert (first["step"], first["kind"], second["step"]) == (5, "oom" if oom else "skip", 6)
    assert first["text"].startswith("skipped: the reason")
    assert ("lower batch_size" in first["text"]) == oom


def test_a_batch_that_cannot_be_written_is_still_reported(tmp_path: Path) -> None:
    (tmp_path / "bad_batches").write_text("in the way")
    with MetricsLogger(tmp_path, [], 0, 9) as metrics_logger:
        dump = SkippedBatchDump(tmp_path, MIXTURE, 0, metrics_logger)
        dump.on_step_skipped(make_state(2), SkippedStep(1, make_packs(), "the reason", False))
    (event,) = read_events(tmp_path / "events.jsonl")
    assert "its batch could not be kept: " in event["text"]


def test_metrics_add_up_the_ranks_and_count_a_replica_once(tmp_path: Path) -> None:
    """Four ranks in two replicas: each rank's counts appear twice."""
    engine: Any = SimpleNamespace(
        device=SimpleNamespace(type="cpu"),
        comm_timer=SimpleNamespace(collect_and_reset=lambda: 0.0),
        ranks_per_replica=2,
        dist_context=SimpleNamespace(world_size=4, all_gather_object=lambda mine: [mine] * 4),
    )
    loader: Any = SimpleNamespace(num_started=lambda: [5, 40])
    state = TrainState(3, np.array([100, 50]), skipped_steps=1)
    with MetricsLogger(tmp_path, [], 0, 9) as metrics_logger:
        callback = MetricsCallback(engine, loader, MIXTURE, StepTimer(), FlopsModel(small_model()), metrics_logger)
        callback.on_log(state, {"Loss/train": 1.0})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    counts = {key: line[key] for key in ("Run/tokens", "Run/skipped", "Tokens/even", "Tokens/odd")}
    assert counts == {"Run/tokens": 300.0, "Run/skipped": 1, "Tokens/even": 200.0, "Tokens/odd": 100.0}
    assert (line["Epoch/even"], line["Epoch/odd"]) == (1.0, 4.0)
    assert line["Memory/peak_gb"] > 0
