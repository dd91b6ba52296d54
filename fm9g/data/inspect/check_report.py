"""The report of a check as text and as a plot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.data.encode.oversize import EMPTY, LONG_INPUT, OVERSIZE
from fm9g.printable import printable
from fm9g.text_table import display_width, text_table

_TABLE_WIDTH, _BAR_WIDTH = 118, 50  # columns of the terminal

CheckReport = dict[str, Any]


def format_report(report: CheckReport) -> str:
    """The report as text: a column per dataset, and a histogram of the lengths of all samples.

    report: the content of check.json.
    """
    packing = report["packing"]
    per_row = f"{packing['padding']:.2%} padding, {packing['samples_per_row']:.1f} samples per row"
    if report["samples_per_pack"]:
        summary = f"without packing: {per_row} ({packing['rows']:,} rows simulated)\n"
    else:
        summary = f"packing: {per_row} of {report['capacity']:,} tokens ({packing['rows']:,} rows simulated)\n"
    return "\n".join([*_dataset_tables(report), summary, *_bars(report)])


def _dataset_tables(report: CheckReport) -> Iterator[str]:
    """The lines of the tables, each with as many datasets as fit beside each other."""
    rows = _table_rows(report)
    labels = ["", *(label for label, _ in rows)]
    columns = [
        [printable(task), *(text.format(**_table_values(stats)) for _, text in rows)]
        for task, stats in report["datasets"].items()
    ]
    while columns:
        widths = np.cumsum([_width_of(labels), *(_width_of(column) + 2 for column in columns)])
        fit = max(1, int(np.count_nonzero(widths <= _TABLE_WIDTH)) - 1)
        yield from text_table(list(zip(labels, *columns[:fit])), right=range(1, fit + 1))
        yield ""
        del columns[:fit]


def _width_of(column: list[str]) -> int:
    return max(map(display_width, column))


def _table_rows(report: CheckReport) -> list[tuple[str, str]]:
    """(label, format) of each row."""
    run = f"in {report['steps']} steps"
    return [
        ("records", "{records:,}"),
        *([("records read", "{read:,}")] if report["sample"] else []),
        ("tokens", "{tokens:,}"),
        ("  per sample: mean", "{mean:,.1f}"),
        ("  min", "{min:,}"),
        ("  median", "{median:,}"),
        ("  95 %", "{p95:,}"),
        ("  max", "{max:,}"),
        ("tokens kept", "{kept_tokens:,}"),
        ("  trained on", "{trained:.1%}"),
        ("samples truncated", "{truncated:,}"),
        ("cut into segments", "{segmented:,}"),
        ("  segments", "{segments:,}"),
        (f"dropped: {LONG_INPUT}", "{long_input:,}"),
        (f"dropped: {OVERSIZE}", "{oversize:,}"),
        (f"dropped: {EMPTY}", "{empty:,}"),
        ("exact duplicates", "{duplicates:,}"),
        ("share wanted", "{share_wanted:.2%}"),
        ("share realised", "{share_realised:.2%}"),
        (f"tokens {run}", "{run_tokens:,}"),
        (f"records {run}", "{run_records:,}"),
        (f"epochs {run}", "{run_epochs:.3g}"),
    ]


def _table_values(stats: dict[str, Any]) -> dict[str, Any]:
    return stats | {
        "trained": stats["learnt_tokens"] / max(1, stats["kept_tokens"]),
        "long_input": stats["dropped"][LONG_INPUT],
        "oversize": stats["dropped"][OVERSIZE],
    }


def _bars(report: CheckReport) -> Iterator[str]:
    """The histogram of the lengths of all samples."""
    counts = np.sum([stats["histogram"] for stats in report["datasets"].values()], axis=0)
    buckets, used = report["buckets"], np.flatnonzero(counts)
    yield "tokens per sample, all datasets"
    for number in range(used[0], used[-1] + 1) if len(used) else ():
        name = f"{buckets[number - 1] + 1 if number else 1:,} - {buckets[number]:,}"
        bar = "█" * math.ceil(_BAR_WIDTH * counts[number] / counts.max())
        yield f"{name:>21}  {bar} {counts[number]:,}"
        if buckets[number] == report["max_length"]:
            yield f"{'max_length':>21}  {'─' * _BAR_WIDTH}"


def plot_report(report: CheckReport, file: Path) -> None:
    """Writes a PNG with the lengths of each dataset's samples, and the shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    above.set(xscale="log", xlabel="tokens per sample", ylabel="% of the dataset's records")
    for task, stats in report["datasets"].items():
        above.stairs(100 * np.array(stats["histogram"]) / stats["read"], [0.5, *report["buckets"]], label=_label(task))
    limit = report["max_length"]
    above.axvline(limit, color="grey", linestyle="--", label=f"max_length {limit}")
    above.legend()
    above.grid(alpha=0.3)
    x = np.arange(len(report["datasets"]))
    below.set(ylabel="% of the tokens", xticks=x, xticklabels=list(map(_label, report["datasets"])))
    for shift, key, label in ((-0.2, "share_wanted", "wanted"), (0.2, "share_realised", "realised")):
        below.bar(x + shift, [100 * stats[key] for stats in report["datasets"].values()], 0.4, label=label)
    below.tick_params(axis="x", rotation=20 if len(x) > 4 else 0)
    below.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's default font has no Chinese characters, and draws boxes
        figure.savefig(file, format="png", dpi=120)


def _label(task: str) -> str:
    """A name for matplotlib, which takes dollars for the beginning of a formula."""
    return task.replace("$", r"\$")
