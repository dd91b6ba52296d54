"""What a run says of itself at its start."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fm9g.train.runner import TrainResult

Train = Callable[..., TrainResult]


def test_the_summary_says_which_keys_give_the_tokens_per_step(train: Train, capsys: pytest.CaptureFixture) -> None:
    train("out", train_iters=1, gradient_accumulation_steps=3)
    assert (
        "384 tokens per step: batch_size 2 x max_length 64 x gradient_accumulation_steps 3\n" in capsys.readouterr().err
    )
    train("other", train_iters=1, gradient_accumulation_steps=1, global_batch_size=5)
    assert "640 tokens per step: batch_size 2 x max_length 64 x global_batch_size 5\n" in capsys.readouterr().err
