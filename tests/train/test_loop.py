"""The loop's arithmetic: what a step divides by, and that accumulation is one large batch."""

import numpy as np
import pytest
import torch
from engine_runs import CAPACITY, Figures, documents
from support import small_model

from fm9g.config.train import TrainConfig
from fm9g.data.pack import Pack, collate
from fm9g.engine.processes import Processes
from fm9g.engine.torch import TorchEngine
from fm9g.train.build import build_model
from fm9g.train.clock import Clock
from fm9g.train.loop import TrainState, to_batch, train

STEPS = 4


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


def run(packs_a_step: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    config = TrainConfig(config="x", train_iters=STEPS, warmup_iters=0, lr=0.01, clip_grad=0.7)
    figures = Figures()
    state = TrainState(0, np.zeros(2, np.int64))
    loader = Fixed(packs_a_step)
    with Processes("cpu") as processes:
        engine = TorchEngine(processes, seed=0)
        build_model(engine, config, small_model(), None)
        train(config, ["even", "odd"], engine, loader, state, figures, Clock())  # type: ignore[arg-type]
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
    config = TrainConfig(config="x")
    total = count = 0.0
    with Processes("cpu") as processes:
        engine = TorchEngine(processes, seed=0)
        build_model(engine, config, small_model(), None)
        for pack in Fixed(4).next_step():
            batch, tasks = to_batch(pack, torch.device("cpu"))
            assert len(tasks) == len(batch.targets) == pack.target_tokens
            losses = engine.forward(batch, 0)[1]
            weights = torch.ones_like(losses) if batch.target_weights is None else batch.target_weights
            total += (losses * weights).sum().item()
            count += pack.total_weight
    assert figures[0]["Loss/train"] == pytest.approx(total / count, rel=1e-6)
