"""The metrics and events of a run, and the files they go to; see trackers.py for where else."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from fm9g.io.atomic import atomic_file
from fm9g.memory import is_out_of_memory
from fm9g.progress import Progress
from fm9g.report.files import EVENTS_FILE, METRICS_FILE, RUN_FILE, finite_or_none, read_metrics
from fm9g.train.trackers import Histogram, Tracker

logger = logging.getLogger(__name__)

_CONSOLE_METRICS = {  # on the console: tag -> name and format
    "Loss/train": ("loss", "{:.4f}"),
    "Loss/val": ("val_loss", "{:.4f}"),
    "Perplexity/val": ("val_ppl", "{:.2f}"),
    "Optimizer/lr": ("lr", "{:.3e}"),
    "Optimizer/grad_norm": ("grad_norm", "{:.3f}"),
    "Throughput/tokens_per_second": ("tokens/s", "{:.0f}"),
    "Throughput/mfu": ("mfu", "{:.1%}"),
    "Memory/peak_gb": ("GB", "{:.2f}"),
}
_TASK_METRICS = ("Tokens/", "Epoch/")  # on TensorBoard and such with tensorboard_all_tasks alone
_SPIKE_WINDOW, _SPIKE_MIN_LOSSES = 64, 16  # logged losses that a spike is measured against


class MetricsLogger:
    """Writes metrics to the console, metrics.jsonl and the trackers, on rank 0; use as a context manager.

    What cannot be written is said once, and ends nothing.
    """

    def __init__(
        self,
        log_dir: Path,
        trackers: list[Tracker],
        first_step: int,
        last_step: int,
        all_tasks: bool = False,
        spike: float = 0.0,
    ) -> None:
        """first_step: finished steps at the start. Metrics of later steps, from a course that was left, are dropped.

        all_tasks: trackers get the metrics of each task, too. spike: standard deviations that make a spike of a loss.
        """
        self._log_dir, self._trackers, self._all_tasks = log_dir, trackers, all_tasks
        self._metrics_file, self._events_file = log_dir / METRICS_FILE, log_dir / EVENTS_FILE
        log_dir.mkdir(parents=True, exist_ok=True)
        if first_step == 0:  # a new run under an old name
            for file in (self._metrics_file, self._events_file):
                if file.is_file():
                    file.replace(file.with_name(f"{file.name}.old"))
        kept = [metrics for metrics in read_metrics(self._metrics_file) if metrics["step"] <= first_step]
        with atomic_file(self._metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept), encoding="utf-8")
        losses = [loss for line in kept if (loss := finite_or_none(line.get("Loss/train"))) is not None]
        self._spike_sigmas, self._recent_losses = spike, deque(losses, maxlen=_SPIKE_WINDOW)
        self._last_task_losses: dict[str, float] = {}
        self._warned: set[str] = set()
        self._disabled: set[str] = set()  # trackers that get nothing any more
        self._progress = Progress("step", total=last_step, unit="steps", done=first_step)
        self._started = time.monotonic(), first_step

    def write_run_info(self, content: dict[str, Any]) -> None:
        """Writes what the run is to run.json, for reports. content: JSON."""
        with atomic_file(self._log_dir / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def advance(self) -> None:
        """One more step is finished."""
        self._progress.advance()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: TensorBoard tag -> value; what is not finite is written as null, and to no tracker."""
        finite = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        self._append(self._metrics_file, {"step": step, **{tag: finite.get(tag) for tag in metrics}})
        self._send(step, finite)
        shown = [
            f"{name} {form.format(metrics[tag])}" for tag, (name, form) in _CONSOLE_METRICS.items() if tag in metrics
        ]
        if (eta := self._seconds_left()) is not None and "Loss/train" in metrics:
            shown.append(f"eta {eta // 3600:.0f}:{eta // 60 % 60:02.0f}:{eta % 60:02.0f}")
        self._progress.set_metrics(" ".join(shown))
        if "Loss/train" in finite:
            self._check_spike(step, finite["Loss/train"])

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for tracker in self._trackers:
            self._try(type(tracker).__name__, lambda tracker=tracker: tracker.log_histograms(step, histograms))

    def log_event(self, step: int, kind: str, text: str) -> None:
        """Something that happened, in a sentence: to events.jsonl and the console. May be called in any thread."""
        self.record_event(step, kind, text)
        logger.info(f"step {step}: {text}")

    def record_event(self, step: int, kind: str, text: str, **extra: Any) -> None:
        """As log_event, but not to the console. extra: further keys of its line."""
        self._append(
            self._events_file, {"step": step, "time": round(time.time(), 3), "kind": kind, "text": text, **extra}
        )

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        task_metrics = {tag: value for tag, value in metrics.items() if tag.startswith(_TASK_METRICS)}
        sent = {tag: value for tag, value in metrics.items() if tag not in task_metrics}
        if self._all_tasks:
            losses = {tag: value for tag, value in metrics.items() if tag.startswith("Loss/train/")}
            self._last_task_losses |= losses
            sent |= task_metrics | (self._last_task_losses if "Loss/train" in metrics else {})
        for tracker in self._trackers:
            self._try(type(tracker).__name__, lambda tracker=tracker: tracker.log_metrics(step, sent))

    def _check_spike(self, step: int, loss: float) -> None:
        if self._spike_sigmas and len(self._recent_losses) >= _SPIKE_MIN_LOSSES:
            mean, deviation = statistics.fmean(self._recent_losses), statistics.pstdev(self._recent_losses)
            # A loss that hardly moves makes no spike of what is a thousandth above it.
            if loss > mean + self._spike_sigmas * max(deviation, 1e-3 * mean):
                self.log_event(step, "spike", f"loss spike: {loss:.4f}; the mean of the last was {mean:.4f}")
        self._recent_losses.append(loss)

    def _seconds_left(self) -> float | None:
        began, first = self._started
        done, total = self._progress.done - first, self._progress.total or 0
        return (time.monotonic() - began) / done * (total - self._progress.done) if done else None

    def _append(self, file: Path, content: dict[str, Any]) -> None:
        def write() -> None:
            line = (json.dumps(content, ensure_ascii=False) + "\n").encode()
            with file.open("a+b") as out:  # at once, so that lines of two threads do not mix
                out.write(line if _ends_with_newline(out) else b"\n" + line)

        self._try(str(file), write)

    def _try(self, name: str, action: Any) -> None:
        if name in self._disabled:
            return
        try:
            action()
        except Exception as error:  # trackers are others' code, and a run is worth more than its metrics
            if is_out_of_memory(error):  # a queue whose thread could not start takes some metrics, and then blocks
                self._disabled.add(name)
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(f"{name}: cannot be written ({error}); training continues")

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.__exit__(None, None, None)
        for tracker in self._trackers:
            self._try(type(tracker).__name__, tracker.close)


def _ends_with_newline(file: BinaryIO) -> bool:
    """Whether the last line has its end, which a full disk or a kill may have cut off."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
