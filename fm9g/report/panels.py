"""The charts of the page: their curves, legends and captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fm9g.report.curves import Curve, binned_means, curve, running_mean
from fm9g.report.devices import memory_caption, mfu_caption
from fm9g.report.draw import COLORS, Line, Mark, draw_lines, draw_stacked_areas
from fm9g.report.files import Run

# kind of an event -> matplotlib's marker, the same symbol as text, meaning
EVENT_KINDS = {
    "resume": (">", "▶", "resumed from a checkpoint"),
    "spike": ("^", "▲", "jump of the loss"),
    "skip": ("x", "✕", "step skipped"),
    "oom": ("D", "◆", "out of memory"),
    "signal": ("s", "■", "stopped by a signal"),
    "save_failed": ("X", "✖", "checkpoint not saved"),
    "prune_failed": ("X", "✖", "old checkpoint not deleted"),
    "best": ("*", "★", "best validation loss"),
    "early_stop": ("o", "●", "stopped early"),
    "save": ("|", "|", "checkpoint saved"),
    "start": ("", "", "started"),
    "end": ("", "", "ended"),
}
_OTHER_EVENT = ("P", "✚", "other event")
TIME_METRICS = {
    "Time/compute": "computing",
    "Time/data": "waiting for data",
    "Time/communication": "communication between processes",
    "Time/checkpoint": "saving checkpoints",
    "Time/evaluation": "evaluation",
}


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend. symbol: line, dash, area, or that of a mark. color: None for that of the text."""

    symbol: str
    label: str
    color: int | None = None


@dataclass(frozen=True)
class Panel:
    """A chart of the page. svg: safe to insert."""

    title: str
    caption: str
    svg: str
    legend: list[LegendEntry]
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    id: str
    title: str
    text: str
    panels: list[Panel] = field(default_factory=list)


def sections(runs: list[Run]) -> list[Section]:
    """All charts that have values, by section; a section without any is left out."""
    every = [
        Section(
            "loss",
            "Loss",
            "The loss measures how badly the model predicts the next token: lower is better. A good curve falls "
            "quickly at first, then ever more slowly.",
            list(_loss(runs)),
        ),
        Section(
            "tasks",
            "Loss of each dataset",
            "The same loss, over the samples of one dataset at a time. Datasets differ in difficulty: what matters is "
            "whether each curve falls, not which one is lowest.",
            list(_tasks(runs)),
        ),
        Section(
            "optimizer",
            "Learning",
            "The learning rate, and the size of the gradients.",
            list(_optimizer(runs)),
        ),
        Section(
            "speed",
            "Speed and memory",
            "How fast the hardware trains, and what it spends time and memory on.",
            list(_speed(runs)),
        ),
    ]
    return [section for section in every if section.panels]


def tasks_of(run: Run) -> list[str]:
    """Names of the datasets that a run trains on, those of its mixture first."""
    return _tasks_in(run, run.data, "Loss/train/", "Tokens/", "Epoch/")


def validation_tasks_of(run: Run) -> list[str]:
    """Names of the datasets that a run is evaluated on."""
    return _tasks_in(run, run.validation, "Loss/val/")


def _tasks_in(run: Run, described: list[dict[str, Any]], *starts: str) -> list[str]:
    names = [str(item["task"]) for item in described if "task" in item]
    keys = dict.fromkeys(key for line in run.metrics for key in line)
    names += [key.removeprefix(start) for start in starts for key in keys if key.startswith(start)]
    return list(dict.fromkeys(names))


def is_routine(run: Run, event: dict[str, Any]) -> bool:
    """Whether an event needs no attention: a saved checkpoint, or a best loss that did not last."""
    if event["kind"] == "best":
        return event is not next(other for other in reversed(run.events) if other["kind"] == "best")
    return bool(event["kind"] == "save")


def _loss(runs: list[Run]) -> Iterator[Panel]:
    lines, keys = _train_and_val(runs, "")
    if not lines:
        return
    marks, mark_keys = _marks(runs)
    caption = "Faint: the loss of each logged step; bold: its running mean."
    caption += " Symbols at the upper edge: events, which are listed below." if mark_keys else ""
    svg = draw_lines("loss", "Loss of the whole run", lines, "loss (nats per token)", marks, wide=True)
    yield Panel("The whole run", caption, svg, keys + mark_keys, wide=True)
    if focus := _zoom_range(lines):
        svg = draw_lines("loss-late", "Loss, close up", lines, "loss (nats per token)", wide=True, focus=focus)
        without = f"The same without the first {focus[0]:,.0f} steps, enlarged; outliers are cut off."
        yield Panel("Close up", without, svg, keys, wide=True)


def _train_and_val(runs: list[Run], task: str) -> tuple[list[Line], list[LegendEntry]]:
    """The training and validation loss of each run. task: "/NAME", or "" for all data."""
    lines, keys, dashed = [], [], False
    for number, run in enumerate(runs):
        train, val = curve(run.metrics, f"Loss/train{task}"), curve(run.metrics, f"Loss/val{task}")
        val_color = number if len(runs) > 1 else 1
        if len(train):
            lines.append(Line(train, number, smooth=True))
        if len(val):
            lines.append(Line(val, val_color, dashed=True))
            dashed = True
        if len(runs) > 1 and (len(train) or len(val)):
            keys.append(LegendEntry("line", run.name, number))
        elif len(runs) == 1:
            keys += [LegendEntry("line", "training", 0)] if len(train) else []
            keys += [LegendEntry("dash", "validation: text that is not trained on", 1)] if len(val) else []
    if len(runs) > 1 and dashed:
        keys.append(LegendEntry("dash", "validation: text that is not trained on"))
    return lines, keys


def _zoom_range(lines: list[Line]) -> tuple[float, float, float] | None:
    """(first step, lowest, highest value) of the late part of the loss, if the first fall hides it; else None."""
    means = [running_mean(line.curve) if line.smooth else line.curve for line in lines]
    last = max(mean.steps[-1] for mean in means)
    start = float(last // 10)
    late = np.concatenate([mean.after(start).values for mean in means])
    late = late[np.isfinite(late)]
    if len(late) < 50:
        return None
    values = np.concatenate([line.curve.values for line in lines])
    low, high = float(late.min()), float(np.quantile(late, 0.995))
    if high <= low or np.nanmax(values) - low < 2 * (high - low):
        return None
    margin = 0.15 * (high - low)
    return start, low - margin, high + margin


def _marks(runs: list[Run]) -> tuple[list[Mark], list[LegendEntry]]:
    marks, meanings = [], {}
    for number, run in enumerate(runs):
        for event in run.events:
            marker, symbol, words = EVENT_KINDS.get(event["kind"], _OTHER_EVENT)
            if not marker or (event["kind"] == "best" and is_routine(run, event)):
                continue
            text = f"{run.name}, step {event['step']:,}: {event['text'] or words}"
            color = number if len(runs) > 1 else None
            marks.append(Mark(event["step"], marker, text, color, low=event["kind"] == "save"))
            meanings[symbol] = words
    order = [*EVENT_KINDS.values(), _OTHER_EVENT]
    return marks, [LegendEntry(symbol, meanings[symbol]) for _, symbol, _ in order if symbol in meanings]


def _tasks(runs: list[Run]) -> Iterator[Panel]:
    tasks = list(dict.fromkeys(task for run in runs for task in [*tasks_of(run), *validation_tasks_of(run)]))
    if len(runs) == 1 and len(tasks) <= COLORS:  # few curves: one chart
        lines, keys = [], []
        for number, task in enumerate(tasks):
            train = curve(runs[0].metrics, f"Loss/train/{task}")
            val = curve(runs[0].metrics, f"Loss/val/{task}")
            lines += [Line(train, number, smooth=True)] if len(train) else []
            lines += [Line(val, number, dashed=True)] if len(val) else []
            keys += [LegendEntry("line", task, number)] if len(train) or len(val) else []
        if any(line.dashed for line in lines):
            keys.append(LegendEntry("dash", "validation"))
        if lines:
            svg = draw_lines("tasks", "Loss of each dataset", lines, "loss (nats per token)", wide=True)
            yield Panel("All datasets", "Faint: logged steps; bold: running mean.", svg, keys, wide=True)
        return
    for number, task in enumerate(tasks):
        lines, keys = _train_and_val(runs, f"/{task}")
        if lines:
            yield Panel(task, "", draw_lines(f"task{number}", f"Loss of {task}", lines, "loss"), keys)


def _optimizer(runs: list[Run]) -> Iterator[Panel]:
    yield from _metric_panel(
        runs,
        "Optimizer/lr",
        "Learning rate",
        "How far a step moves the weights. It usually rises at the start (warmup) and falls towards the end.",
        smooth=False,
    )
    yield from _metric_panel(
        runs,
        "Optimizer/grad_norm",
        "Gradient norm",
        "The norm of the gradients before clipping. Lasting growth or many peaks mean that training is not stable.",
        log=True,
    )
    scales = np.concatenate([curve(run.metrics, "Optimizer/scale").values for run in runs])
    if len(np.unique(scales[np.isfinite(scales)])) > 1:  # only fp16 changes it
        yield from _metric_panel(
            runs,
            "Optimizer/scale",
            "Loss scale",
            "For fp16: it halves when gradients overflow, and doubles after many steps without overflow.",
            smooth=False,
        )


def _speed(runs: list[Run]) -> Iterator[Panel]:
    yield from _metric_panel(
        runs, "Throughput/tokens_per_second", "Tokens per second", "Over all processes. Dips are saving or evaluation."
    )
    yield from _metric_panel(
        runs,
        "Throughput/mfu",
        "Use of the hardware (MFU), %",
        mfu_caption(runs),
        transform=lambda values: 100 * values,
    )
    yield from _metric_panel(
        runs,
        "Memory/peak_gb",
        "Peak memory, GB",
        memory_caption(runs),
        smooth=False,
    )
    for number, run in enumerate(runs):
        yield from _time_panel(number, run, len(runs) > 1)


def _time_panel(number: int, run: Run, several: bool) -> Iterator[Panel]:
    edges, values = binned_means(run.metrics, list(TIME_METRICS))
    total = (values * np.diff(edges)).sum()
    if not values.size or total <= 0:
        return
    shares = (values * np.diff(edges)).sum(1) / total
    used = [index for index, share in enumerate(shares) if share > 0]
    labels = list(TIME_METRICS.values())
    title = f"Where the time goes: {run.name}" if several else "Where the time goes"
    svg = draw_stacked_areas(f"times{number}", title, edges, values[used], used, "seconds per step")
    keys = [LegendEntry("area", f"{labels[index]}, {_percent(shares[index])}", index) for index in used]
    caption = "Seconds per step, by activity. The larger the share of computing, the better."
    yield Panel(title, caption, svg, keys, wide=True)


def _metric_panel(
    runs: list[Run],
    key: str,
    title: str,
    caption: str,
    smooth: bool = True,
    log: bool = False,
    transform: Callable[[Any], Any] = lambda values: values,
) -> Iterator[Panel]:
    """A chart of one metric, with a curve per run. log: logarithmic if the values span enough."""
    lines, keys = [], []
    for number, run in enumerate(runs):
        metric = curve(run.metrics, key)
        if len(metric):
            lines.append(Line(Curve(metric.steps, transform(metric.values)), number, smooth))
            keys += [LegendEntry("line", run.name, number)] if len(runs) > 1 else []
    if not lines:
        return
    values = np.concatenate([line.curve.values for line in lines])
    values = values[np.isfinite(values)]
    log = log and bool(values.min() > 0 and values.max() > 30 * np.median(values))
    svg = draw_lines(key.replace("/", "-").lower(), title, lines, "logarithmic" if log else "", log=log)
    yield Panel(title, caption, svg, keys)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "below 1%"
