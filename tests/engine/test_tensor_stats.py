"""Statistics of sharded tensors on one process; tests/engine/test_base.py has them on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fm9g.engine.dist_context import DistContext
from fm9g.engine.tensor_stats import NUM_BINS, compute_tensor_stats


def test_statistics_are_those_of_numpy_without_nonfinite_values() -> None:
    values = torch.randn(1000)
    values[:3] = torch.tensor([float("nan"), float("inf"), -50.0])
    with DistContext("cpu") as dist_context:
        (stats,) = compute_tensor_stats(
            [(lambda: values, 1)], lambda tensor: tensor, dist_context.all_gather_object, torch.device("cpu")
        )
    finite = values[2:].numpy()
    assert (stats.count, stats.num_nonfinite, stats.max_abs) == (1000, 2, 50.0)
    assert stats.sum_sq == pytest.approx((finite**2).sum(), rel=2e-5)
    assert stats.sum == pytest.approx(finite.sum(), rel=1e-4)
    expected, _ = np.histogram(np.clip(finite, stats.edges[0], stats.edges[-1]), stats.edges)
    assert len(stats.counts) == NUM_BINS
    np.testing.assert_allclose(stats.counts, expected, atol=1)
