"""Norm and clipping of gradients, and loss scaling."""

from __future__ import annotations

import pytest
import torch

from fm9g.engine.gradients import DynamicLossScaler, clip_factor, grad_norm


def test_the_norm_counts_a_replicated_part_once() -> None:
    """Of two processes that hold the same part of b, the sum over processes has it twice."""
    a, b = torch.tensor([3.0]), torch.tensor([4.0])
    norm = grad_norm({"a": a, "b": b}, {"a": 2, "b": 2}, lambda total: total * 2, torch.device("cpu"))
    assert norm == 5.0
    empty = grad_norm({"a": torch.zeros(0)}, {"a": 1}, lambda total: total, torch.device("cpu"))
    assert empty == 0.0


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(10))
    grad = torch.randn(10, generator=torch.Generator().manual_seed(0))
    weight.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_([weight], max_norm)
    torch.testing.assert_close(grad * clip_factor(norm, max_norm), weight.grad)
    assert clip_factor(norm, 0.0) == 1.0


def test_the_scale_halves_on_overflow_and_doubles_after_an_interval_without() -> None:
    scaler, scales = DynamicLossScaler(8.0, growth_interval=2), []
    for finite in (True, False, True, True, True, True, False):
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [8.0, 4.0, 4.0, 8.0, 8.0, 16.0, 8.0]
    lowest = DynamicLossScaler(1.0, growth_interval=2)
    lowest.update(finite=False)
    assert lowest.scale == 1.0
