"""Where figures go: each sink gets them, none can end a run, and a step that does not log waits for nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_harness import EngineCase, FixedLoader, RecordingCallbacks, prepared
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from fm9g.config.train import TrainConfig
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError
from fm9g.report.files import read_events, read_metrics
from fm9g.train.loop import TrainState, train
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.runner import TrainResult
from fm9g.train.timer import StepTimer
from fm9g.train.trackers import Histogram, TensorBoard, build_trackers

HISTOGRAM = Histogram(np.array([1.0, 5.0, 2.0]), np.linspace(-1, 1, 4), sum=0.5, sum_sq=2.5)


class FakeTrackerPackage:
    """Stands in for a package of the kind of wandb."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **given: Any) -> Any:
        self.started.append(given)
        return SimpleNamespace(log=lambda metrics, step: self.logged.append((step, metrics)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Histogram(np_histogram: Any) -> Any:  # noqa: N802 (wandb's name)
        return ("histogram", np_histogram)


def test_histograms_are_read_back_by_tensorboard(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path, 0)
    tracker.log_histograms(3, {"weights/a": HISTOGRAM})
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (found,) = events.Histograms("weights/a")
    assert found.step == 3
    value = found.histogram_value
    assert (value.num, value.sum, value.sum_squares) == (8.0, 0.5, 2.5)
    assert list(value.bucket) == [1.0, 5.0, 2.0]
    assert list(value.bucket_limit) == pytest.approx([-1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_other_services_get_the_same_figures(
    train_run: Callable[..., TrainResult], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = FakeTrackerPackage()
    monkeypatch.setitem(sys.modules, name, package)
    first = train_run("out", report_to=name, stop_iters=2)
    second = train_run("out", report_to=name, resume_ckpt="auto")
    assert not first.tensorboard_dir.exists()
    lines = read_metrics(second.metrics_file)
    assert [step for step, _ in package.logged] == [line["step"] for line in lines] == [1, 2, 3, 4]
    for (_, metrics), line in zip(package.logged, lines):
        assert metrics["Loss/train"] == line["Loss/train"]
    assert package.finished == 2
    started = package.started[0]
    assert started["project"] == "fm9g"
    assert started["config"]["max_length"] == 64
    if name == "wandb":
        assert package.started[0]["id"] == package.started[1]["id"]
        train_run("out", report_to=name, overwrite=True)
        assert package.started[2]["id"] != package.started[0]["id"]


@pytest.fixture
def train_run(train: Callable[..., TrainResult]) -> Callable[..., TrainResult]:
    return lambda out, **changes: train(out, **{"train_iters": 4, "save_iters": 4, **changes})


def test_a_service_that_is_not_installed_is_named_before_anything_starts(
    train_run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError, match="report_to: swanlab is not installed here; pip install swanlab"):
        train_run("out", report_to="swanlab")
    assert not list((tmp_path / "out" / "checkpoints" / "m").iterdir())


def test_a_sink_that_fails_is_named_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
            raise RuntimeError("no route to host")

        log_histograms = log_metrics

        def close(self) -> None:
            raise OSError("no route to host")

    with MetricsLogger(tmp_path, [Broken()], 0, 3) as metrics_logger:
        for step in (1, 2, 3):
            metrics_logger.log_metrics(step, {"Loss/train": 1.0})
        metrics_logger.log_histograms(3, {"a": HISTOGRAM})
    assert caplog.text.count("Broken: cannot be written (no route to host); training continues") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_in_no_sink(tmp_path: Path) -> None:
    package = FakeTrackerPackage()
    sys.modules["swanlab"] = package  # type: ignore[assignment]
    try:
        trackers = build_trackers(["swanlab"], tmp_path, tmp_path, "p", "r", {}, 0)
    finally:
        del sys.modules["swanlab"]
    with MetricsLogger(tmp_path, trackers, 0, 3) as metrics_logger:
        metrics_logger.log_metrics(1, {"Loss/train": float("nan"), "Optimizer/lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "Loss/train": None, "Optimizer/lr": 0.1}
    assert package.logged == [(1, {"Optimizer/lr": 0.1})]


def test_lines_of_a_course_that_was_left_go_and_those_of_events_stay(tmp_path: Path) -> None:
    for first, last in ((0, 5), (3, 6)):
        with MetricsLogger(tmp_path, [], first, 6) as metrics_logger:
            metrics_logger.log_event(first, "start", "begun")
            for step in range(first + 1, last + 1):
                metrics_logger.log_metrics(step, {"Loss/train": float(first)})
    assert [line["Loss/train"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.0] * 3 + [3.0] * 3
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [0, 3]


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

        class CountingCallbacks(RecordingCallbacks):
            def on_step_end(self) -> None:
                looks.append(mode.count)

        loader: Any = FixedLoader(0, 1, 0)
        train(
            config,
            ["even", "odd"],
            engine,
            loader,
            TrainState(0, np.zeros(2, np.int64)),
            CountingCallbacks(),
            StepTimer(),
        )
    between = np.diff(looks)
    assert (between == 0).all() if log_iters == 100 else (between > 0).all()
