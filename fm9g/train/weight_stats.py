"""Statistics of weights and gradients: histograms for the trackers, a table for the console."""

from __future__ import annotations

import math
import re

from fm9g.engine.tensor_stats import TensorStats
from fm9g.text_table import text_table
from fm9g.train.trackers import Histogram

Stats = dict[str, tuple[TensorStats, TensorStats]]  # weight name -> statistics of the weight and of its gradient


def weight_histograms(stats: Stats) -> dict[str, Histogram]:
    """Histograms under the tags weights/NAME and gradients/NAME."""
    histograms: dict[str, Histogram] = {}
    for name, (weight, grad) in stats.items():
        histograms |= {f"weights/{name}": _histogram(weight), f"gradients/{name}": _histogram(grad)}
    return histograms


def weight_table(stats: Stats) -> str:
    """A line for each layer, and for each weight outside of the layers."""
    groups: dict[str, list[tuple[TensorStats, TensorStats]]] = {}
    for name, pair in stats.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        groups.setdefault(f"layer {layer[1]}" if layer else name, []).append(pair)
    rows = [["", "weight rms", "largest", "gradient rms", "largest", "not finite"]]
    for name, pairs in groups.items():
        weights, grads = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        max_weight, max_grad = (max(item.max_abs for item in items) for items in (weights, grads))
        nonfinite = sum(item.num_nonfinite for item in [*weights, *grads])
        values = (_rms(weights), max_weight, _rms(grads), max_grad)
        rows.append([name, *(f"{value:.4g}" for value in values), str(nonfinite)])
    return "\n".join(f"  {line}" for line in text_table(rows, right=range(1, 6)))


def _histogram(stats: TensorStats) -> Histogram:
    return Histogram(stats.counts, stats.edges, stats.sum, stats.sum_sq)


def _rms(items: list[TensorStats]) -> float:
    count = sum(item.count - item.num_nonfinite for item in items)
    return math.sqrt(sum(item.sum_sq for item in items) / max(1, count))
