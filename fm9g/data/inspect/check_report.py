"""The figures of fm9g.data.inspect.check as text and as a picture."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.data.encode.encoder import EMPTY, LONG_INPUT, OVERSIZE
from fm9g.printable import printable

_TABLE_WIDTH, _BAR_WIDTH = 118, 50  # characters of a line of the table, of the longest bar


def format_report(report: dict[str, Any]) -> str:
    """The report as text: a column a dataset, and the lengths of all records as bars."""
    packing, datasets = report["packing"], report["datasets"]
    run = f"in {report['steps']} steps"
    rows = [
        ("records", "{records:,}"),
        ("records read", "{read:,}") if report["sample"] else ("", ""),
        ("tokens", "{tokens:,}"),
        ("  a record: mean", "{mean:,.1f}"),
        ("  min", "{min:,}"),
        ("  median", "{median:,}"),
        ("  95 %", "{p95:,}"),
        ("  max", "{max:,}"),
        ("tokens kept", "{kept_tokens:,}"),
        ("  of these learnt", "{learnt:.1%}"),
        ("records truncated", "{truncated:,}"),
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
    columns = [["", *(label for label, _ in rows if label)]]
    for task, stats in datasets.items():
        more = {"learnt": stats["learnt_tokens"] / max(1, stats["kept_tokens"])}
        more |= {"long_input": stats["dropped"][LONG_INPUT], "oversize": stats["dropped"][OVERSIZE]}
        columns.append([printable(task), *(text.format(**stats, **more) for label, text in rows if label)])
    lines = []
    while len(columns) > 1:
        widths = [max(map(_display_width, column)) for column in columns]
        fits = max(1, sum(np.cumsum(widths[1:]) + 2 * np.arange(1, len(columns)) <= _TABLE_WIDTH - widths[0]))
        for cells in zip(*columns[: fits + 1]):
            first, *others = (" " * (width - _display_width(cell)) for cell, width in zip(cells, widths))
            lines.append("  ".join([cells[0] + first, *(pad + cell for pad, cell in zip(others, cells[1:]))]).rstrip())
        del columns[1 : fits + 1]
        lines.append("")
    lines.append(
        f"packing: {packing['padding']:.2%} padding, {packing['samples_per_row']:.1f} samples a row of "
        f"{report['capacity']:,} tokens ({packing['rows']:,} rows tried)\n"
    )
    return "\n".join([*lines, *_bars(report)])


def _display_width(text: str) -> int:
    """Columns on a terminal."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _bars(report: dict[str, Any]) -> Iterator[str]:
    """The histogram of the lengths of all records."""
    counts = np.sum([stats["histogram"] for stats in report["datasets"].values()], axis=0)
    buckets, used = report["buckets"], np.flatnonzero(counts)
    yield "tokens a record, all datasets"
    for number in range(used[0], used[-1] + 1) if len(used) else ():
        name = f"{buckets[number - 1] + 1 if number else 1:,} - {buckets[number]:,}"
        bar = "█" * math.ceil(_BAR_WIDTH * counts[number] / counts.max())
        yield f"{name:>21}  {bar} {counts[number]:,}"
        if buckets[number] == report["max_length"]:
            yield f"{'max_length':>21}  {'─' * _BAR_WIDTH}"


def plot_report(report: dict[str, Any], file: Path) -> None:
    """The lengths of each dataset's records and the shares as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1)
    above.set(xscale="log", xlabel="tokens a record", ylabel="% of the dataset's records")
    for task, stats in report["datasets"].items():
        above.stairs(100 * np.array(stats["histogram"]) / stats["read"], [0.5, *report["buckets"]], label=_name(task))
    limit = report["max_length"]
    above.axvline(limit, color="grey", linestyle="--", label=f"max_length {limit}")
    above.legend()
    above.grid(alpha=0.3)
    x = np.arange(len(report["datasets"]))
    below.set(ylabel="% of the tokens", xticks=x, xticklabels=list(map(_name, report["datasets"])))
    for shift, key, label in ((-0.2, "share_wanted", "wanted"), (0.2, "share_realised", "realised")):
        below.bar(x + shift, [100 * f[key] for f in report["datasets"].values()], 0.4, label=label)
    below.tick_params(axis="x", rotation=20 if len(x) > 4 else 0)
    below.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's own font lacks Chinese; names then show as boxes
        figure.savefig(file, format="png", dpi=120)


def _name(task: str) -> str:
    """A name for a picture, in which dollars would begin a formula."""
    return task.replace("$", r"\$")
