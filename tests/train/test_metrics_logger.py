"""Where metrics go, and that none of these places can stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fm9g.run_files import read_events, read_metrics
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.trackers import Histogram


def test_a_tracker_that_fails_is_named_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
            raise RuntimeError("no route to host")

        log_histograms = log_metrics

        def close(self) -> None:
            raise OSError("no route to host")

    with MetricsLogger(tmp_path, [Broken()], 0, 3) as metrics_logger:
        for step in (1, 2, 3):
            metrics_logger.log_metrics(step, {"Loss/train": 1.0})
        metrics_logger.log_histograms(3, {"a": Histogram(np.ones(2), np.arange(3.0), sum=1.0, sum_sq=1.0)})
    assert caplog.text.count("Broken: cannot be written (no route to host); training continues") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_metric_that_is_not_finite_is_null_in_the_file_and_in_no_tracker(tmp_path: Path) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    tracker: Any = SimpleNamespace(log_metrics=lambda step, metrics: sent.append((step, metrics)), close=lambda: None)
    with MetricsLogger(tmp_path, [tracker], 0, 3) as metrics_logger:
        metrics_logger.log_metrics(1, {"Loss/train": float("nan"), "Optimizer/lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "Loss/train": None, "Optimizer/lr": 0.1}
    assert sent == [(1, {"Optimizer/lr": 0.1})]


def test_metrics_after_the_resumed_step_are_removed_and_events_stay(tmp_path: Path) -> None:
    for first, last in ((0, 5), (3, 6)):
        with MetricsLogger(tmp_path, [], first, 6) as metrics_logger:
            metrics_logger.log_event(first, "start", "begun")
            for step in range(first + 1, last + 1):
                metrics_logger.log_metrics(step, {"Loss/train": float(first)})
    assert [line["Loss/train"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.0] * 3 + [3.0] * 3
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [0, 3]
