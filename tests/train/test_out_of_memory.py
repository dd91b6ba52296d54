"""Runs that do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fm9g.engine.fsdp import FSDPEngine
from fm9g.errors import UserError
from fm9g.train.runner import TrainResult

Train = Callable[..., TrainResult]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
@pytest.mark.parametrize("where", ["forward", "evaluate", "prepare", "step"])
def test_running_out_of_memory_is_one_message_that_says_what_to_lower(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    if where == "prepare":
        monkeypatch.setattr("fm9g.model.transformer.FM9G.init_weight", fail)
    else:
        monkeypatch.setattr(f"fm9g.engine.base.Engine.{where}", fail)
    expected = "fm9g plan" if where == "prepare" else "lower batch_size or max_length .*activation_checkpoint full"
    with pytest.raises(UserError, match=f"memory.*{expected}") as raised:
        train("out", train_iters=1, val_dataset=tmp_path / "mixture.json", eval_iters=1)
    assert "\n" not in str(raised.value)


def test_a_resumed_run_skips_a_batch_that_does_not_fit_at_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train("out", train_iters=2)
    forward, calls = FSDPEngine.forward, iter(range(100))

    def short(self: FSDPEngine, *given: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *given)

    monkeypatch.setattr(FSDPEngine, "forward", short)
    assert train("out", resume_ckpt="auto", train_iters=4).step == 4
