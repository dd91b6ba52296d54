"""Tensors of every kind, and the message that refuses a weight file."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fm9g.errors import UserError
from fm9g.io.pt_file import open_pt, read_weights


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {
        "plain": torch.randn(6, 5),
        "parameter": nn.Parameter(torch.randn(3, 3)),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "half": torch.randn(9).bfloat16(),
        "turned": torch.randn(6, 7).t(),
        "repeated": torch.randn(1, 3).expand(4, 3),
    }
    shared = torch.randn(8, 4)
    return {**tensors, "rows": shared[2:5], "columns": shared[:, 1:3], "all": shared}


def refused(file: Path | str) -> str:
    """The one message that every reader gives."""
    reported = set()
    for reader in (read_weights, open_pt):
        with pytest.raises(UserError) as raised:
            reader(Path(file))
        reported.add(str(raised.value))
    assert len(reported) == 1
    message = reported.pop()
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{file}: ")
    assert "weights_only" not in message
    assert not Path("ran").exists()
    return message
