"""The table and the histograms of weight statistics."""

import numpy as np
import pytest

from fm9g.engine.tensor_stats import TensorStats
from fm9g.train.weight_stats import weight_histograms, weight_table


def stats_of(*values: float) -> TensorStats:
    finite = np.array([value for value in values if np.isfinite(value)])
    counts, edges = np.histogram(finite, 4, (-8.0, 8.0))
    total, squares = float(finite.sum()), float((finite**2).sum())
    return TensorStats(len(values), len(values) - len(finite), total, squares, float(abs(finite).max()), counts, edges)


@pytest.fixture
def stats() -> dict[str, tuple[TensorStats, TensorStats]]:
    return {
        "input_embedding.weight": (stats_of(3.0, -3.0), stats_of(0.5, 0.5)),
        "encoder.layers.0.a.weight": (stats_of(1.0, 1.0), stats_of(2.0, float("nan"))),
        "encoder.layers.0.b.weight": (stats_of(7.0, 7.0), stats_of(-4.0, 4.0)),
    }


def test_the_table_has_a_row_per_layer(stats: dict[str, tuple[TensorStats, TensorStats]]) -> None:
    header, *rows = weight_table(stats).splitlines()
    assert "weight rms" in header
    assert [row.split() for row in rows] == [
        ["input_embedding.weight", "3", "3", "0.5", "0.5", "0"],
        ["layer", "0", "5", "7", f"{12**0.5:.4g}", "4", "1"],  # of both its weights; the NaN is left out
    ]


def test_histograms_have_the_values_of_each_weight_and_gradient(
    stats: dict[str, tuple[TensorStats, TensorStats]],
) -> None:
    histograms = weight_histograms(stats)
    assert list(histograms) == [f"{kind}/{name}" for name in stats for kind in ("weights", "gradients")]
    of_b = histograms["weights/encoder.layers.0.b.weight"]
    assert (of_b.counts.tolist(), of_b.sum, of_b.sum_sq) == ([0, 0, 0, 2], 14.0, 98.0)
