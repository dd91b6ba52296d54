"""The training loop: fetch, forward and backward over micro-batches, step; then log, evaluate, save."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fm9g.config.train import TrainConfig
from fm9g.data.encode import IGNORED
from fm9g.data.loader import Loader
from fm9g.data.pack import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.memory import TRAINING_ADVICE, is_out_of_memory
from fm9g.model.transformer import Batch
from fm9g.train.bad import BadSteps
from fm9g.train.clock import Clock
from fm9g.train.schedule import learning_rate


@dataclass
class TrainState:
    """How far a run is. task_tokens: tokens trained on, for each task; on rank 0 those before a resume are included.
    skipped: steps that changed nothing. loss: of the last logged step. val_loss: of the evaluation at this very step.
    best: the lowest of all evaluations; worse: evaluations since.
    """

    step: int
    task_tokens: np.ndarray
    skipped: int = 0
    loss: float | None = None
    val_loss: float | None = None
    best: float | None = None
    worse: int = 0


class Desk(Protocol):
    """What the loop has done for it, at its moments; see fm9g.train.desk."""

    def wishes(self) -> tuple[bool, bool]:
        """Whether this process wants to stop, and whether it wants a checkpoint now."""

    def stepped(self) -> None:
        """One more step is finished."""

    def skipped(self, step: int, packs: list[Pack], why: str) -> None:
        """A step changed nothing; packs: those of this process."""

    def inspect(self) -> None:
        """The gradients of a step are whole, and its weights not yet changed."""

    def log(self, figures: dict[str, float], clock: Clock) -> None:
        """figures: of the step just finished."""

    def evaluate(self) -> bool:
        """Returns whether it is time to stop for what was found."""

    def save(self) -> None:
        """Writes a checkpoint of the state."""


def train(
    config: TrainConfig, tasks: list[str], engine: Engine, loader: Loader, state: TrainState, desk: Desk, clock: Clock
) -> None:
    """Trains from state.step until the last step, the end of the data, or the wish of any rank to stop.

    tasks: the names behind the packs' task ids. Raises UserError where too many steps in a row were skipped.
    """
    saved = evaluated = logged = state.step
    stop, fits = False, state.step > 0  # a step of the session before did
    bad = BadSteps(engine, config.max_bad_steps)
    while state.step < config.last_step and not stop:
        with clock.span("data"):
            packs = loader.next_step()
        with clock.span("communication"):  # the hosts agree, and no GPU is waited for
            counts = engine.processes.sum_floats([sum(pack.total_weight for pack in packs), *desk.wishes()])
        targets, stop, save_now = counts[0], counts[1] > 0, counts[2] > 0
        if not loader.endless and targets == 0:
            break
        task_losses = torch.zeros(len(tasks), device=engine.device)
        short = not _accumulate(config, engine, packs, state.step, targets, task_losses, clock, may_skip=fits)
        fits = fits or not short
        state.step += 1
        state.val_loss = None
        if config.inspect_iters and state.step % config.inspect_iters == 0 and not short:
            desk.inspect()
        lr = learning_rate(config, state.step - 1)
        norm = torch.tensor(torch.nan) if short else engine.step(lr, config.clip_grad)
        if not short:
            for pack in packs:
                state.task_tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=len(tasks))
        clock.count(packs)
        desk.stepped()
        bad.add(state.step, packs, norm, short)

        last = state.step == config.last_step
        logs = state.step % config.log_iters == 0 or last or stop
        evaluates = bool(config.val_dataset) and (state.step % config.eval_iters == 0 or last)
        saves = state.step % config.save_iters == 0 or save_now
        _look(bad, state, desk, wait=logs or saves)
        log = functools.partial(_log, tasks, engine, state, desk, clock, packs, task_losses, lr, norm)
        if logs:
            log()
            logged = state.step
        if evaluates:
            with clock.span("evaluation"):
                stop = desk.evaluate() or stop
            evaluated = state.step
        if saves and not bad.in_a_row:
            with clock.span("checkpoint"):
                desk.save()
            saved = state.step
    if logged != state.step:  # the data ended, which is known a step later
        _look(bad, state, desk, wait=True)
        log()
    if config.val_dataset and evaluated != state.step and not stop:  # who gives a signal does not want to wait
        desk.evaluate()
    if saved != state.step:
        desk.save()


def _look(bad: BadSteps, state: TrainState, desk: Desk, wait: bool) -> None:
    """Has the desk know of steps that were found to have changed nothing. Raises UserError where they are too many."""
    for step, packs, why in bad.found(wait):
        state.skipped += 1
        desk.skipped(step, packs, why)
    bad.check()


def _log(
    tasks: list[str],
    engine: Engine,
    state: TrainState,
    desk: Desk,
    clock: Clock,
    packs: list[Pack],
    task_losses: torch.Tensor,
    lr: float,
    norm: torch.Tensor,
) -> None:
    """Has the desk write the figures of the step just finished. The device is waited for."""
    figures = _losses(tasks, engine, packs, task_losses)
    figures |= {"Optimizer/lr": lr, "Optimizer/grad_norm": norm.item(), "Optimizer/scale": engine.loss_scale.scale}
    state.loss = figures["Loss/train"] if math.isfinite(figures["Loss/train"]) else None
    desk.log(figures, clock)


def _accumulate(
    config: TrainConfig,
    engine: Engine,
    packs: list[Pack],
    step: int,
    targets: float,
    task_losses: torch.Tensor,
    clock: Clock,
    may_skip: bool,
) -> bool:
    """Adds up the gradients of a step, and the losses of tasks. Returns False where the memory was short; then there
    are no gradients.

    may_skip: a step before this one did fit; else no later one will. Raises UserError where the memory is short and the
    step cannot be skipped: another process waits for this one, or ignore_cuda_oom is false.
    """
    share = engine.processes.world_size / engine.replicas / (targets or 1)
    numbers = torch.arange(len(task_losses), device=engine.device)[:, None]
    try:
        for i, pack in enumerate(packs):
            with clock.span("data"):
                batch, row_tasks = to_batch(pack, engine.device)
            loss_sum, losses = engine.forward(batch, (step * len(packs) + i) * engine.replicas + engine.replica)
            engine.backward(loss_sum * share, last=i == len(packs) - 1)
            # Not index_add_, which adds in no fixed order on a GPU.
            losses = losses if batch.target_weights is None else losses * batch.target_weights
            task_losses += torch.where(row_tasks == numbers, losses, 0.0).sum(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if may_skip and config.ignore_cuda_oom and engine.processes.world_size == 1:
            engine.clear_gradients()
            return False
        raise UserError(
            f"step {step + 1}: a row of {len(packs[0].input_ids)} tokens does not fit in the memory of "
            f"{engine.device}; {TRAINING_ADVICE}"
        ) from error
    return True


def to_batch(pack: Pack, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """A pack on the device, and (R,) the task of each of its targets."""
    rows = np.flatnonzero(pack.targets != IGNORED)
    arrays = (pack.input_ids, pack.positions, pack.cu_seqlens, rows, pack.targets[rows], pack.task_ids[rows])
    ids, positions, cu_seqlens, target_rows, targets, tasks = (_on_device(array, device) for array in arrays)
    lengths = np.diff(pack.cu_seqlens).tolist()
    weights = None if pack.target_weights is None else _on_device(pack.target_weights[rows], device)
    return Batch(ids, positions, cu_seqlens, lengths, target_rows, targets.long(), weights), tasks


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # Only a copy from pinned memory goes on beside the computation.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _losses(tasks: list[str], engine: Engine, packs: list[Pack], task_losses: torch.Tensor) -> dict[str, float]:
    """The mean loss over all targets of a step by their weights, and over those of each task that had one."""
    counts = np.zeros(len(tasks))
    for pack in packs:
        rows = pack.targets != IGNORED
        weights = None if pack.target_weights is None else pack.target_weights[rows]
        counts += np.bincount(pack.task_ids[rows], weights, minlength=len(tasks))
    # In one message, which the device is waited for once.
    both = torch.stack([task_losses, _on_device(counts.astype(np.float32), engine.device)])
    sums, targets = engine.sum(both).tolist()
    figures = {"Loss/train": sum(sums) / (sum(targets) or 1)}
    for task, loss, count in zip(tasks, sums, targets):
        if count:
            figures[f"Loss/train/{task}"] = loss / count
    return figures
