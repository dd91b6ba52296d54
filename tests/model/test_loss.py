"""Cross entropy in chunks, with label smoothing, z-loss and weights of targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fm9g.model.loss import LossConfig, linear_cross_entropy


@pytest.mark.parametrize(
    "loss_config",
    [LossConfig(), LossConfig(0.2), LossConfig(z_loss=0.05), LossConfig(0.1, 0.02)],
    ids=["plain", "smoothing", "z-loss", "both"],
)
@pytest.mark.parametrize("chunk_rows", [1024, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_equal_those_by_hand(loss_config: LossConfig, chunk_rows: int, weighted: bool) -> None:
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(10) * 2
    target_weights = torch.tensor([0.5, 2.0] * 5) if weighted else None
    total, plain = linear_cross_entropy(hidden, weight, targets, loss_config, target_weights, chunk_rows=chunk_rows)
    logits = hidden @ weight.T
    rows_by_hand = F.cross_entropy(logits, targets, label_smoothing=loss_config.label_smoothing, reduction="none")
    rows_by_hand = rows_by_hand + loss_config.z_loss * logits.logsumexp(-1).square()
    by_hand = (rows_by_hand if target_weights is None else rows_by_hand * target_weights).sum()
    torch.testing.assert_close(total, by_hand, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets, reduction="none").detach())
    for actual, reference in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(by_hand, (hidden, weight))
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)


def test_the_loss_works_in_chunks_and_without_any_row() -> None:
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.arange(9).repeat(2)[:10]
    at_once = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    parts = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk_rows=3)[0], (hidden, weight))
    torch.testing.assert_close(at_once, parts)
    total, rows = linear_cross_entropy(hidden[:0], weight, targets[:0])
    total.backward()
    assert (total.item(), len(rows)) == (0.0, 0)
