"""Writes the metrics and events of a run: to its files, the console and the experiment trackers."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fm9g.io.atomic import atomic_file
from fm9g.out_of_memory import is_out_of_memory
from fm9g.progress import Progress
from fm9g.run_files import EVENTS_FILE, METRICS_FILE, RUN_FILE, finite_or_none, read_metrics
from fm9g.train.loss_spikes import LossSpikeDetector
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
_TASK_METRICS = ("Tokens/", "Epoch/")  # trackers get these only with tensorboard_all_tasks


class MetricsLogger:
    """On rank 0; a context manager. A destination that fails is reported once and does not stop training."""

    def __init__(
        self,
        log_dir: Path,
        trackers: list[Tracker],
        first_step: int,
        last_step: int,
        all_tasks: bool = False,
        spike_sigmas: float = 0.0,
    ) -> None:
        """Removes metrics of later steps than first_step, which a run that was abandoned left in the files.

        Args:
            log_dir: where metrics.jsonl, events.jsonl and run.json go.
            trackers: further destinations; closed at the end.
            first_step: finished steps at the start; with 0, the files of an earlier run get the suffix .old.
            last_step: for the time that is left.
            all_tasks: trackers get the metrics of each task, too.
            spike_sigmas: see LossSpikeDetector.
        """
        self._log_dir, self._trackers, self._all_tasks = log_dir, trackers, all_tasks
        self._metrics_file, self._events_file = log_dir / METRICS_FILE, log_dir / EVENTS_FILE
        log_dir.mkdir(parents=True, exist_ok=True)
        if first_step == 0:  # a new run under an old name
            for file in (self._metrics_file, self._events_file):
                if file.is_file():
                    file.replace(file.with_name(f"{file.name}.old"))
        valid = [metrics for metrics in read_metrics(self._metrics_file) if metrics["step"] <= first_step]
        with atomic_file(self._metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(metrics) + "\n" for metrics in valid), encoding="utf-8")
        losses = [loss for line in valid if (loss := finite_or_none(line.get("Loss/train"))) is not None]
        self._spike_detector = LossSpikeDetector(spike_sigmas, losses)
        self._last_task_losses: dict[str, float] = {}
        self._warned: set[str] = set()
        self._disabled: set[str] = set()  # destinations that get nothing any more
        self._progress = Progress("step", total=last_step, unit="steps", done=first_step)
        self._start_time, self._first_step = time.monotonic(), first_step

    def write_run_info(self, content: dict[str, Any]) -> None:
        """Writes run.json, which reports read. content: JSON."""
        with atomic_file(self._log_dir / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def advance(self) -> None:
        """Counts one more finished step."""
        self._progress.advance()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Logs metrics, tag -> value. Values that are not finite become null in the file, and go to no tracker."""
        finite = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        self._append(self._metrics_file, {"step": step, **{tag: finite.get(tag) for tag in metrics}})
        self._send_to_trackers(step, finite)
        self._show_on_console(metrics)
        if "Loss/train" in finite:
            loss = finite["Loss/train"]
            if (mean := self._spike_detector.add(loss)) is not None:
                self.log_event(step, "spike", f"loss spike: {loss:.4f}; the mean of the last was {mean:.4f}")

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Sends histograms, by tag, to the trackers."""
        self._for_each_tracker(lambda tracker: tracker.log_histograms(step, histograms))

    def log_event(self, step: int, kind: str, text: str) -> None:
        """Logs an event, described in a sentence, to events.jsonl and the console. Thread-safe."""
        self.record_event(step, kind, text)
        logger.info(f"step {step}: {text}")

    def record_event(self, step: int, kind: str, text: str, **extra: Any) -> None:
        """As log_event, but not to the console. extra: further keys of its line."""
        now = round(time.time(), 3)
        self._append(self._events_file, {"step": step, "time": now, "kind": kind, "text": text, **extra})

    def _show_on_console(self, metrics: dict[str, float]) -> None:
        shown = [
            f"{name} {spec.format(metrics[tag])}" for tag, (name, spec) in _CONSOLE_METRICS.items() if tag in metrics
        ]
        if (eta := self._seconds_left()) is not None and "Loss/train" in metrics:
            shown.append(f"eta {eta // 3600:.0f}:{eta // 60 % 60:02.0f}:{eta % 60:02.0f}")
        self._progress.set_metrics(" ".join(shown))

    def _seconds_left(self) -> float | None:
        done, total = self._progress.done, self._progress.total or 0
        if done == self._first_step:
            return None
        return (time.monotonic() - self._start_time) / (done - self._first_step) * (total - done)

    def _send_to_trackers(self, step: int, metrics: dict[str, float]) -> None:
        task_metrics = {tag: value for tag, value in metrics.items() if tag.startswith(_TASK_METRICS)}
        sent = {tag: value for tag, value in metrics.items() if tag not in task_metrics}
        if self._all_tasks:
            self._last_task_losses |= {tag: value for tag, value in metrics.items() if tag.startswith("Loss/train/")}
            sent |= task_metrics | (self._last_task_losses if "Loss/train" in metrics else {})
        self._for_each_tracker(lambda tracker: tracker.log_metrics(step, sent))

    def _for_each_tracker(self, action: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            self._try(type(tracker).__name__, functools.partial(action, tracker))

    def _append(self, file: Path, content: dict[str, Any]) -> None:
        def write() -> None:
            line = (json.dumps(content, ensure_ascii=False) + "\n").encode()
            with file.open("a+b") as out:  # in one write, so that lines of two threads do not mix
                out.write(line if _ends_with_newline(out) else b"\n" + line)

        self._try(str(file), write)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Does the action; warns on its first failure. name: of the destination."""
        if name in self._disabled:
            return
        try:
            action()
        except Exception as error:  # third-party code, and a run is worth more than its metrics
            if is_out_of_memory(error):  # a queue whose thread could not start takes some metrics, and then blocks
                self._disabled.add(name)
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(f"{name}: cannot be written ({error}); training continues")

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__(None, None, None)
        self._for_each_tracker(lambda tracker: tracker.close())


def _ends_with_newline(file: BinaryIO) -> bool:
    """Whether the last line is complete: a full disk or a kill may have cut it off."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
