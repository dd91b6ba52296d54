"""Experiment trackers: each gets the same metrics."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fm9g.errors import UserError
from fm9g.run_files import read_metrics
from fm9g.train.runner import TrainResult
from fm9g.train.trackers import Histogram, TensorBoard

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
def test_other_services_get_the_same_metrics(
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
