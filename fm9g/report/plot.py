"""Draws the loss of runs as one picture, for papers, slides and messages."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.printable import printable
from fm9g.report.curves import curve, downsample, running_mean
from fm9g.report.files import Run
from fm9g.run_files import METRICS_FILE, read_metrics

_MARKED_KINDS = ("resume", "spike", "skip", "oom", "early_stop")
_MAX_MARKS = 12  # more would hide the curve
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)


def plot_loss(metrics_file: Path, picture: Path, marks: dict[int, str] | None = None) -> None:
    """Draws a run's loss, its running mean, the validation loss and the learning rate.

    Args:
        metrics_file: of the run.
        picture: the file to write; its suffix is the format, one of fm9g.io.output.IMAGE_SUFFIXES.
        marks: step -> what happened there.

    Raises UserError.
    """
    metrics = read_metrics(metrics_file)
    if not metrics:
        raise UserError(f"{metrics_file}: holds no metrics, so there is nothing to draw")
    _draw({"loss": metrics}, picture, marks or {})


def plot_runs(runs: list[Run], picture: Path) -> None:
    """Draws the loss of several runs into one chart; of a single one as plot_loss does, with its events."""
    if not any(len(curve(run.metrics, key)) for run in runs for key in ("Loss/train", "Loss/val")):
        raise UserError(f"{runs[0].folder / METRICS_FILE}: holds no loss, so there is nothing to draw")
    marks: dict[int, str] = {}
    for event in runs[0].events if len(runs) == 1 else ():
        if event["kind"] in _MARKED_KINDS and (event["step"] in marks or len(marks) < _MAX_MARKS):
            before = marks.get(event["step"], "")
            marks[event["step"]] = f"{before}{', ' if before else ''}{event['kind'].replace('_', ' ')}"
    _draw({"loss" if len(runs) == 1 else run.name: run.metrics for run in runs}, picture, marks)


def _draw(runs: dict[str, list[dict[str, Any]]], picture: Path, marks: dict[int, str]) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "fm9g", "text.parse_math": False, "font.family": ["DejaVu Sans", *_cjk_font()]}
    with matplotlib.rc_context(style), atomic_file(picture) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs that no font of this machine has; they show as boxes
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats per token)")
        handles: list[Any] = []
        for number, (name, metrics) in enumerate(runs.items()):
            handles += _plot_run(axes, printable(name), metrics, f"C{number}", several=len(runs) > 1)
        if len(runs) == 1:
            handles += _plot_lr(axes, next(iter(runs.values())))
        for step, text in marks.items():
            axes.axvline(step, color="grey", linestyle="--", linewidth=1)
            # At the upper edge, whatever the curve does.
            axes.annotate(
                text,
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
            )
        axes.grid(alpha=0.3)
        columns = max(1, min(4, 100 // max(len(line.get_label()) + 8 for line in handles)))
        figure.legend(handles=handles, loc="outside upper right", ncols=columns)
        kind = picture.suffix.lower().removeprefix(".")
        dates: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        figure.savefig(temporary, format=kind, dpi=120, metadata=dates)


def _plot_run(axes: Any, name: str, metrics: list[dict[str, Any]], color: str, several: bool) -> list[Any]:
    """Draws a run; returns the lines for the legend. The zero-width space keeps names that start with _ in it."""
    train, val = curve(metrics, "Loss/train"), curve(metrics, "Loss/val")
    shown, mean = downsample(train), downsample(running_mean(train))
    dot = "." if len(shown) == 1 else ""
    (faint,) = axes.plot(shown.steps, shown.values, dot + "-", color=color, alpha=0.3, label=f"\u200b{name}")
    (bold,) = axes.plot(
        mean.steps, mean.values, color=color, label=f"\u200b{name}" if several else "running mean of the loss"
    )
    lines = [bold] if several else [faint, bold]
    if len(val):
        (dashed,) = axes.plot(
            val.steps,
            val.values,
            ".--",
            color=color if several else "C2",
            label=f"\u200b{name}, validation" if several else "validation loss",
        )
        lines.append(dashed)
    return lines


def _plot_lr(axes: Any, metrics: list[dict[str, Any]]) -> list[Any]:
    rate = downsample(curve(metrics, "Optimizer/lr"))
    if not len(rate):
        return []
    right = axes.twinx()
    right.set_ylabel("learning rate")
    return list(right.plot(rate.steps, rate.values, color="C1", linestyle=":", label="learning rate"))


def _cjk_font() -> list[str]:
    """A font of this machine for Chinese text, which matplotlib's own lacks; empty if there is none."""
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    return [name for name in _CJK_FONTS if name in known][:1]
