"""The losses of a hundred steps, written down: a change that is to change no arithmetic changes none of them.

FM9G_GOLDEN=write makes the file anew, after a change that is meant to.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fm9g.run_files import read_metrics
from fm9g.train.runner import TrainResult

GOLDEN = Path(__file__).with_name("golden.json")
SETTINGS = {
    "train_iters": 100,
    "save_iters": 100,
    "lr": 0.003,
    "ema_decay": 0.9,
    "z_loss": 1e-4,
    "label_smoothing": 0.05,
}


def machine() -> str:
    """What this machine makes of plain torch operations: others round differently, and give other last digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 64, generator=generator)
    weight = torch.randn(64, 48, generator=generator).requires_grad_()
    y = torch.nn.functional.scaled_dot_product_attention(*(x.view(1, 2, 48, 64) for _ in range(3)), is_causal=True)
    loss = (torch.nn.functional.silu(y.reshape(96, 64) @ weight)).logsumexp(-1).sum() + x.square().mean().rsqrt()
    loss.backward()
    assert weight.grad is not None
    return f"{zlib.crc32(weight.grad.numpy().tobytes() + loss.detach().numpy().tobytes()):08x}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The number of threads is the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_hundred_losses_are_what_they_were(train: Callable[..., TrainResult], one_thread: None) -> None:
    lines = read_metrics(train("out", **SETTINGS).metrics_file)
    found = {
        "losses": [line["Loss/train"] for line in lines],
        "norms": [line["Optimizer/grad_norm"] for line in lines],
    }
    assert len(found["losses"]) == 100
    if os.environ.get("FM9G_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, **found}, indent=0))
    golden = json.loads(GOLDEN.read_text())
    for key, values in found.items():
        if golden["machine"] == machine():
            assert values == golden[key]
        assert values == pytest.approx(golden[key], rel=1e-3)
