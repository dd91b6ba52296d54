"""The loop's arithmetic: what a step divides by, and that accumulation is one large batch."""

import numpy as np
import pytest
import torch
from support import small_model

from fm9g.config.train import TrainConfig
from fm9g.data.pack import Pack, Sample, collate
from fm9g.engine.torch import TorchEngine
from fm9g.train.loop import TrainState, train
from fm9g.train.run import build_model

CAPACITY, STEPS = 32, 4


def documents(step: int) -> list[list[Sample]]:
    """Four groups of documents of unequal length, each fitting in one row, with masked inputs of unequal share."""
    source = np.random.default_rng(step)
    groups = []
    for lengths in ([30], [3, 20, 5], [1, 1], [16, 14]):
        group = []
        for length in lengths:
            ids = source.integers(0, 320, length)
            tokens = np.append(ids, ids[:1]).astype(np.int32)
            read = source.integers(0, length)
            tokens[: 1 + read] = ~tokens[: 1 + read]
            group.append(Sample(tokens, dataset=length % 2, place=0, piece=0))
        groups.append(group)
    return groups


class Fixed:
    """A loader of the same documents, as four packs or as one four times as long."""

    endless = True

    def __init__(self, packs_a_step: int) -> None:
        self.packs_a_step, self.step = packs_a_step, 0

    def next_step(self) -> list[Pack]:
        self.step += 1
        groups = documents(self.step)
        if self.packs_a_step == 1:
            groups = [[sample for group in groups for sample in group]]
        return [collate(group, CAPACITY * 4 // self.packs_a_step) for group in groups]


class Figures:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def advance(self) -> None: ...

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.lines.append(figures)


def run(packs_a_step: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    config = TrainConfig(config="x", train_iters=STEPS, warmup_iters=0, lr=0.01, clip_grad=0.7)
    engine = TorchEngine("cpu", seed=0)
    build_model(engine, config, small_model(), None)
    figures = Figures()
    state = TrainState(0, np.zeros(2, np.int64))
    loader = Fixed(packs_a_step)
    train(config, ["even", "odd"], engine, loader, figures, state, lambda: None, lambda: False)  # type: ignore[arg-type]
    return figures.lines, {name: weight.clone() for name, weight in engine.weights()}


def test_four_micro_batches_equal_one_large_batch() -> None:
    four, weights_four = run(4)
    one, weights_one = run(1)
    for line_four, line_one in zip(four, one):
        for key in ("Loss/train", "Loss/train/even", "Loss/train/odd", "Optimizer/grad_norm"):
            assert line_four[key] == pytest.approx(line_one[key], rel=2e-5)
    for name, weight in weights_four.items():
        torch.testing.assert_close(weight, weights_one[name], rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_all_targets_of_the_step() -> None:
    figures, _ = run(4)
    engine = TorchEngine("cpu", seed=0)
    config = TrainConfig(config="x")
    build_model(engine, config, small_model(), None)
    from fm9g.train.loop import to_batch

    total, count = 0.0, 0
    for pack in Fixed(4).next_step():
        batch, tasks = to_batch(pack, torch.device("cpu"))
        assert len(tasks) == len(batch.targets) == pack.target_tokens
        total += engine.forward(batch)[1].sum().item()
        count += len(batch.targets)
    assert figures[0]["Loss/train"] == pytest.approx(total / count, rel=1e-6)
