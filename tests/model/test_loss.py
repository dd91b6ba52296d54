"""What is trained for beside plain cross entropy, and noise on embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.common import make_batch, small_model

from fm9g.model.loss import LossConfig, linear_cross_entropy
from fm9g.model.transformer import FM9G


@pytest.mark.parametrize(
    "loss_config",
    [LossConfig(), LossConfig(0.2), LossConfig(z_loss=0.05), LossConfig(0.1, 0.02)],
    ids=["plain", "smoothing", "z-loss", "both"],
)
@pytest.mark.parametrize("rows", [1024, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_equal_those_by_hand(
    loss_config: LossConfig, rows: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fm9g.model.loss._CHUNK_ROWS", rows)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(10) * 2
    counts = torch.tensor([0.5, 2.0] * 5) if weighted else None
    total, plain = linear_cross_entropy(hidden, weight, targets, loss_config, counts)
    logits = hidden @ weight.T
    rows_by_hand = F.cross_entropy(logits, targets, label_smoothing=loss_config.label_smoothing, reduction="none")
    rows_by_hand = rows_by_hand + loss_config.z_loss * logits.logsumexp(-1).square()
    by_hand = (rows_by_hand if counts is None else rows_by_hand * counts).sum()
    torch.testing.assert_close(total, by_hand, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets, reduction="none").detach())
    for ours, theirs in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(by_hand, (hidden, weight))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_noise_is_as_large_as_its_document_says_and_only_in_training() -> None:
    """NEFTune: uniform in +-alpha / sqrt(length * width)."""
    model = FM9G(small_model(), neftune_alpha=3.0)
    batch = make_batch([50, 2])
    x = torch.zeros(52, 32)
    noise = torch.stack([model._neftune_noise(x, batch) for _ in range(200)])
    for span, length in ((slice(0, 50), 50), (slice(50, 52), 2)):
        bound = 3.0 / (length * 32) ** 0.5
        assert noise[:, span].abs().max() <= bound
        assert noise[:, span].abs().max() > 0.95 * bound
        assert noise[:, span].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(model.train().hidden_states(batch), model.hidden_states(batch))
    assert torch.equal(model.eval().hidden_states(batch), model.hidden_states(batch))
