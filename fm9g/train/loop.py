"""The training loop: fetch, forward and backward over micro-batches, step, log, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fm9g.config.train import TrainConfig
from fm9g.data.encode import IGNORED
from fm9g.data.loader import Loader
from fm9g.data.pack import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.model.transformer import Batch
from fm9g.train.metrics import Metrics
from fm9g.train.schedule import learning_rate


@dataclass
class TrainState:
    """How far a run is. task_tokens: tokens trained on, for each task; on rank 0 those before a resume are included."""

    step: int
    task_tokens: np.ndarray


def train(
    config: TrainConfig,
    tasks: list[str],
    engine: Engine,
    loader: Loader,
    metrics: Metrics | None,
    state: TrainState,
    save: Callable[[], None],
    should_stop: Callable[[], bool],
) -> None:
    """Trains from state.step until train_iters, stop_iters, the end of the data, or should_stop on any rank.

    tasks: the names behind the packs' task ids. metrics: on rank 0. save: writes a checkpoint of `state`; called once
    more at the end.
    """
    last = min(config.stop_iters or config.train_iters, config.train_iters)
    saved, stop = state.step, 0
    ranks_a_replica = engine.processes.world_size // engine.replicas
    clock = Clock()
    while state.step < last and not stop:
        packs = loader.next_step()
        # The hosts agree, and no GPU is waited for.
        targets, stop = engine.processes.sum([sum(pack.target_tokens for pack in packs), should_stop()])
        if not loader.endless and targets == 0:
            break
        share = ranks_a_replica / max(1, targets)
        numbers = torch.arange(len(tasks), device=engine.device)[:, None]
        task_losses = torch.zeros(len(tasks), device=engine.device)
        for i, pack in enumerate(packs):
            batch, row_tasks = to_batch(pack, engine.device)
            number = (state.step * len(packs) + i) * engine.replicas + engine.replica
            loss_sum, losses = engine.forward(batch, number)
            engine.backward(loss_sum * share, last=i == len(packs) - 1)
            # Not index_add_, which adds in no fixed order on a GPU.
            task_losses += torch.where(row_tasks == numbers, losses, 0.0).sum(1)
            state.task_tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=len(tasks))
        lr = learning_rate(config, state.step)
        grad_norm = engine.step(lr, config.clip_grad)

        state.step += 1
        clock.count(sum(pack.tokens for pack in packs))
        if metrics:
            metrics.advance()
        if state.step % config.log_iters == 0 or state.step == last:
            task_targets = torch.from_numpy(_targets_by_task(packs, len(tasks))).to(engine.device)
            figures = step_figures(tasks, engine.sum(task_losses), engine.sum(task_targets))
            scale = engine.loss_scale.scale
            figures |= {"Optimizer/lr": lr, "Optimizer/grad_norm": grad_norm.item(), "Optimizer/scale": scale}
            figures["Throughput/tokens_per_second"] = sum(engine.processes.gather(clock.rate())) / ranks_a_replica
            if metrics:
                metrics.write(state.step, figures)
            # A norm that overflows is what loss scaling is there for.
            if not math.isfinite(figures["Loss/train"] + (grad_norm.item() if scale == 1 else 0)):
                raise UserError(
                    f"step {state.step}: the loss or the norm of the gradients is not a finite number. Nothing of it "
                    "is saved. Resume from an earlier checkpoint with a lower lr, or look at the data"
                )
        if state.step % config.save_iters == 0:
            save()
            saved = state.step
    if saved != state.step:
        save()


def to_batch(pack: Pack, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """A pack on the device, and (R,) the task of each of its targets."""
    rows = np.flatnonzero(pack.targets != IGNORED)
    arrays = (pack.input_ids, pack.positions, pack.cu_seqlens, rows, pack.targets[rows], pack.task_ids[rows])
    ids, positions, cu_seqlens, target_rows, targets, tasks = (_on_device(array, device) for array in arrays)
    lengths = np.diff(pack.cu_seqlens).tolist()
    return Batch(ids, positions, cu_seqlens, lengths, target_rows, targets.long()), tasks


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # Only a copy from pinned memory goes on beside the computation.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def step_figures(tasks: list[str], losses: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The mean loss over all targets of a step, and over those of each task that had one."""
    sums, counts = losses.tolist(), targets.tolist()
    figures = {"Loss/train": sum(sums) / max(1, sum(counts))}
    for task, loss, count in zip(tasks, sums, counts):
        if count:
            figures[f"Loss/train/{task}"] = loss / count
    return figures


def _targets_by_task(packs: list[Pack], tasks: int) -> np.ndarray:
    return sum(np.bincount(pack.task_ids[pack.targets != IGNORED], minlength=tasks) for pack in packs)  # type: ignore[return-value]


class Clock:
    """Tokens a second since the last time it was asked."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def rate(self) -> float:
        now = time.monotonic()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        return rate
