"""The figures and events of a run, and the files they go to; see sinks.py for where else."""

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

from fm9g.files import new_file
from fm9g.memory import is_out_of_memory
from fm9g.progress import Progress
from fm9g.report.files import EVENTS_FILE, METRICS_FILE, RUN_FILE, number, read_metrics
from fm9g.train.sinks import Histogram, Sink

logger = logging.getLogger(__name__)

_SHOWN = {  # on the console: tag -> name and format
    "Loss/train": ("loss", "{:.4f}"),
    "Loss/val": ("val_loss", "{:.4f}"),
    "Perplexity/val": ("val_ppl", "{:.2f}"),
    "Optimizer/lr": ("lr", "{:.3e}"),
    "Optimizer/grad_norm": ("grad_norm", "{:.3f}"),
    "Throughput/tokens_per_second": ("tokens/s", "{:.0f}"),
    "Throughput/mfu": ("mfu", "{:.1%}"),
    "Memory/peak_gb": ("GB", "{:.2f}"),
}
_TASK_FIGURES = ("Tokens/", "Epoch/")  # on TensorBoard and such with tensorboard_all_tasks alone
_SPIKE_WINDOW, _SPIKE_FEWEST = 64, 16  # logged losses that a spike is measured against


class Metrics:
    """Writes figures to the console, metrics.jsonl and the sinks, on rank 0; use as a context manager.

    What cannot be written is said once, and ends nothing.
    """

    def __init__(
        self, log: Path, sinks: list[Sink], first_step: int, last_step: int, all_tasks: bool = False, spike: float = 0.0
    ) -> None:
        """first_step: finished steps at the start. Figures of later steps, from a course that was left, are dropped.

        all_tasks: sinks get the figures of each task, too. spike: standard deviations that make a spike of a loss.
        """
        self._log, self._sinks, self._all_tasks = log, sinks, all_tasks
        self._file, self._events = log / METRICS_FILE, log / EVENTS_FILE
        log.mkdir(parents=True, exist_ok=True)
        if first_step == 0:  # a new run under an old name
            for file in (self._file, self._events):
                if file.is_file():
                    file.replace(file.with_name(f"{file.name}.old"))
        kept = [figures for figures in read_metrics(self._file) if figures["step"] <= first_step]
        with new_file(self._file) as temporary:
            temporary.write_text("".join(json.dumps(figures) + "\n" for figures in kept), encoding="utf-8")
        losses = [loss for line in kept if (loss := number(line.get("Loss/train"))) is not None]
        self._spike, self._recent = spike, deque(losses, maxlen=_SPIKE_WINDOW)
        self._last: dict[str, float] = {}
        self._silent: set[str] = set()
        self._ended: set[str] = set()  # sinks that get nothing any more
        self._progress = Progress("step", total=last_step, unit="steps", done=first_step)
        self._started = time.monotonic(), first_step

    def describe(self, content: dict[str, Any]) -> None:
        """Writes what the run is to run.json, for reports. content: JSON."""
        with new_file(self._log / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def advance(self) -> None:
        """One more step is finished."""
        self._progress.advance()

    def write(self, step: int, figures: dict[str, float]) -> None:
        """figures: TensorBoard tag -> value; what is not finite is written as null, and to no sink."""
        finite = {tag: value for tag, value in figures.items() if math.isfinite(value)}
        self._append(self._file, {"step": step, **{tag: finite.get(tag) for tag in figures}})
        self._give(step, finite)
        shown = [f"{name} {form.format(figures[tag])}" for tag, (name, form) in _SHOWN.items() if tag in figures]
        if (left := self._seconds_left()) is not None and "Loss/train" in figures:
            shown.append(f"eta {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}")
        self._progress.figures(" ".join(shown))
        if "Loss/train" in finite:
            self._mark_spike(step, finite["Loss/train"])

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for sink in self._sinks:
            self._try(type(sink).__name__, lambda sink=sink: sink.histograms(step, histograms))

    def event(self, step: int, kind: str, text: str) -> None:
        """Something that happened, in a sentence: to events.jsonl and the console. May be called in any thread."""
        self.record(step, kind, text)
        logger.info(f"step {step}: {text}")

    def record(self, step: int, kind: str, text: str, **more: Any) -> None:
        """As event, but not to the console. more: further keys of its line."""
        self._append(self._events, {"step": step, "time": round(time.time(), 3), "kind": kind, "text": text, **more})

    def _give(self, step: int, figures: dict[str, float]) -> None:
        tasks = {tag: value for tag, value in figures.items() if tag.startswith(_TASK_FIGURES)}
        given = {tag: value for tag, value in figures.items() if tag not in tasks}
        if self._all_tasks:
            losses = {tag: value for tag, value in figures.items() if tag.startswith("Loss/train/")}
            self._last |= losses
            given |= tasks | (self._last if "Loss/train" in figures else {})
        for sink in self._sinks:
            self._try(type(sink).__name__, lambda sink=sink: sink.write(step, given))

    def _mark_spike(self, step: int, loss: float) -> None:
        if self._spike and len(self._recent) >= _SPIKE_FEWEST:
            mean, deviation = statistics.fmean(self._recent), statistics.pstdev(self._recent)
            # A loss that hardly moves makes no spike of what is a thousandth above it.
            if loss > mean + self._spike * max(deviation, 1e-3 * mean):
                self.event(step, "spike", f"loss spike: {loss:.4f}; the mean of the last was {mean:.4f}")
        self._recent.append(loss)

    def _seconds_left(self) -> float | None:
        began, first = self._started
        done, total = self._progress.done - first, self._progress.total or 0
        return (time.monotonic() - began) / done * (total - self._progress.done) if done else None

    def _append(self, file: Path, content: dict[str, Any]) -> None:
        def write() -> None:
            line = (json.dumps(content, ensure_ascii=False) + "\n").encode()
            with file.open("a+b") as out:  # at once, so that lines of two threads do not mix
                out.write(line if _is_whole(out) else b"\n" + line)

        self._try(str(file), write)

    def _try(self, name: str, action: Any) -> None:
        if name in self._ended:
            return
        try:
            action()
        except Exception as error:  # sinks are others' code, and a run is worth more than its figures
            if is_out_of_memory(error):  # a queue whose thread could not start takes some figures, and then blocks
                self._ended.add(name)
            if name not in self._silent:
                self._silent.add(name)
                logger.warning(f"{name}: cannot be written ({error}); training continues")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.__exit__(None, None, None)
        for sink in self._sinks:
            self._try(type(sink).__name__, sink.close)


def _is_whole(file: BinaryIO) -> bool:
    """Whether the last line has its end, which a full disk or a kill may have cut off."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
