"""The loop's arithmetic: what a step divides by, and that accumulation is one large batch."""

import numpy as np
import pytest
import torch
from helpers.common import small_model
from helpers.engine_harness import CAPACITY, RecordingCallbacks, documents

from fm9g.config.train import TrainConfig
from fm9g.data.load.packing import Pack, collate
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine
from fm9g.train.loop import TrainState, to_batch, train
from fm9g.train.model_setup import setup_model_and_optimizer
from fm9g.train.timer import StepTimer

STEPS = 4


class FixedPacksLoader:
    """A loader of the same documents, as four packs or as one four times as long."""

    is_infinite = True

    def __init__(self, packs_per_step: int) -> None:
        self.packs_per_step, self.step = packs_per_step, 0

    def next_batch(self) -> list[Pack]:
        self.step += 1
        groups = documents(self.step)
        if self.packs_per_step == 1:
            groups = [[sample for group in groups for sample in group]]
        return [collate(group, CAPACITY * 4 // self.packs_per_step) for group in groups]


def run(packs_per_step: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    config = TrainConfig(config="x", train_iters=STEPS, warmup_iters=0, lr=0.01, clip_grad=0.7)
    callbacks = RecordingCallbacks()
    state = TrainState(0, np.zeros(2, np.int64))
    loader = FixedPacksLoader(packs_per_step)
    with DistContext("cpu") as dist_context:
        engine = FSDPEngine(dist_context, seed=0)
        setup_model_and_optimizer(engine, config, small_model(), None)
        train(config, ["even", "odd"], engine, loader, state, callbacks, StepTimer())  # type: ignore[arg-type]
        return callbacks.lines, {name: weight.clone() for name, weight in engine.weights()}


def test_four_micro_batches_equal_one_large_batch() -> None:
    four, weights_four = run(4)
    one, weights_one = run(1)
    for line_four, line_one in zip(four, one):
        for key in ("Loss/train", "Loss/train/even", "Loss/train/odd", "Optimizer/grad_norm"):
            assert line_four[key] == pytest.approx(line_one[key], rel=2e-5)
    for name, weight in weights_four.items():
        torch.testing.assert_close(weight, weights_one[name], rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_over_all_targets_of_the_step() -> None:
    lines, _ = run(4)
    config = TrainConfig(config="x")
    total = count = 0.0
    with DistContext("cpu") as dist_context:
        engine = FSDPEngine(dist_context, seed=0)
        setup_model_and_optimizer(engine, config, small_model(), None)
        for pack in FixedPacksLoader(4).next_batch():
            batch, tasks = to_batch(pack, torch.device("cpu"))
            assert len(tasks) == len(batch.targets) == pack.target_tokens
            losses = engine.forward(batch, 0)[1]
            weights = torch.ones_like(losses) if batch.target_weights is None else batch.target_weights
            total += (losses * weights).sum().item()
            count += pack.total_weight
    assert lines[0]["Loss/train"] == pytest.approx(total / count, rel=1e-6)
