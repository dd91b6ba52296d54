"""The training loop: fetch, forward and backward over micro-batches, step; then log, evaluate, save."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fm9g.config.train import TrainConfig
from fm9g.data.encode.encoder import IGNORE_INDEX
from fm9g.data.load.loader import Loader
from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.memory import TRAINING_OOM_ADVICE, is_out_of_memory
from fm9g.model.transformer import Batch
from fm9g.train.lr_schedule import learning_rate
from fm9g.train.skipped_steps import SkippedStepDetector
from fm9g.train.timer import StepTimer


@dataclass
class TrainState:
    """How far a run is. task_tokens: tokens trained on, for each task; on rank 0 those before a resume are included.
    skipped_steps: steps that changed nothing. loss: of the last logged step. val_loss: of the evaluation at this very
    step. best_val_loss: the lowest of all evaluations; evals_since_best: evaluations since.
    """

    step: int
    task_tokens: np.ndarray
    skipped_steps: int = 0
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    evals_since_best: int = 0


class Callbacks(Protocol):
    """What the loop has done for it, at its moments; see fm9g.train.callbacks."""

    def poll_requests(self) -> tuple[bool, bool]:
        """Whether this process wants to stop, and whether it wants a checkpoint now."""

    def on_step_end(self) -> None:
        """One more step is finished."""

    def on_step_skipped(self, step: int, packs: list[Pack], why: str) -> None:
        """A step changed nothing; packs: those of this process."""

    def on_inspect(self) -> None:
        """The gradients of a step are whole, and its weights not yet changed."""

    def on_log(self, metrics: dict[str, float], timer: StepTimer) -> None:
        """metrics: of the step just finished."""

    def evaluate(self) -> bool:
        """Returns whether it is time to stop for what was found."""

    def save(self) -> None:
        """Writes a checkpoint of the state."""


def train(
    config: TrainConfig,
    tasks: list[str],
    engine: Engine,
    loader: Loader,
    state: TrainState,
    callbacks: Callbacks,
    timer: StepTimer,
) -> None:
    """Trains from state.step until the last step, the end of the data, or the wish of any rank to stop.

    tasks: the names behind the packs' task ids. Raises UserError where too many steps in a row were skipped.
    """
    last_saved = last_evaluated = last_logged = state.step
    stop, has_fit = False, state.step > 0  # a step of the session before did
    skip_detector = SkippedStepDetector(engine, config.max_skipped_steps)
    while state.step < config.last_step and not stop:
        with timer.phase("data"):
            packs = loader.next_batch()
        with timer.phase("communication"):  # the hosts agree, and no GPU is waited for
            counts = engine.dist_context.all_reduce_sum_floats(
                [sum(pack.total_weight for pack in packs), *callbacks.poll_requests()]
            )
        targets, stop, save_requested = counts[0], counts[1] > 0, counts[2] > 0
        if not loader.is_infinite and targets == 0:
            break
        task_losses = torch.zeros(len(tasks), device=engine.device)
        oom = not _forward_backward(config, engine, packs, state.step, targets, task_losses, timer, may_skip=has_fit)
        has_fit = has_fit or not oom
        state.step += 1
        state.val_loss = None
        if config.inspect_iters and state.step % config.inspect_iters == 0 and not oom:
            callbacks.on_inspect()
        lr = learning_rate(config, state.step - 1)
        norm = torch.tensor(torch.nan) if oom else engine.step(lr, config.clip_grad)
        if not oom:
            for pack in packs:
                state.task_tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=len(tasks))
        timer.count(packs)
        callbacks.on_step_end()
        skip_detector.add(state.step, packs, norm, oom)

        is_last_step = state.step == config.last_step
        should_log = state.step % config.log_iters == 0 or is_last_step or stop
        should_evaluate = bool(config.val_dataset) and (state.step % config.eval_iters == 0 or is_last_step)
        should_save = state.step % config.save_iters == 0 or save_requested
        _report_skipped(skip_detector, state, callbacks, wait=should_log or should_save)
        log_step = functools.partial(_log_step, tasks, engine, state, callbacks, timer, packs, task_losses, lr, norm)
        if should_log:
            log_step()
            last_logged = state.step
        if should_evaluate:
            with timer.phase("evaluation"):
                stop = callbacks.evaluate() or stop
            last_evaluated = state.step
        if should_save and not skip_detector.consecutive:
            with timer.phase("checkpoint"):
                callbacks.save()
            last_saved = state.step
    if last_logged != state.step:  # the data ended, which is known a step later
        _report_skipped(skip_detector, state, callbacks, wait=True)
        log_step()
    if config.val_dataset and last_evaluated != state.step and not stop:  # who gives a signal does not want to wait
        callbacks.evaluate()
    if last_saved != state.step:
        callbacks.save()


def _report_skipped(skip_detector: SkippedStepDetector, state: TrainState, callbacks: Callbacks, wait: bool) -> None:
    """Tells the callbacks of steps that changed nothing. Raises UserError where they are too many."""
    for step, packs, why in skip_detector.poll(wait):
        state.skipped_steps += 1
        callbacks.on_step_skipped(step, packs, why)
    skip_detector.raise_if_too_many()


def _log_step(
    tasks: list[str],
    engine: Engine,
    state: TrainState,
    callbacks: Callbacks,
    timer: StepTimer,
    packs: list[Pack],
    task_losses: torch.Tensor,
    lr: float,
    norm: torch.Tensor,
) -> None:
    """Has the callbacks log the metrics of the step just finished. The device is waited for."""
    metrics = _loss_metrics(tasks, engine, packs, task_losses)
    metrics |= {"Optimizer/lr": lr, "Optimizer/grad_norm": norm.item(), "Optimizer/scale": engine.loss_scaler.scale}
    state.loss = metrics["Loss/train"] if math.isfinite(metrics["Loss/train"]) else None
    callbacks.on_log(metrics, timer)


def _forward_backward(
    config: TrainConfig,
    engine: Engine,
    packs: list[Pack],
    step: int,
    targets: float,
    task_losses: torch.Tensor,
    timer: StepTimer,
    may_skip: bool,
) -> bool:
    """Adds up the gradients of a step, and the losses of tasks. Returns False where the memory was short; then there
    are no gradients.

    may_skip: a step before this one did fit; else no later one will. Raises UserError where the memory is short and the
    step cannot be skipped: another process waits for this one, or ignore_cuda_oom is false.
    """
    loss_weight = engine.dist_context.world_size / engine.dp_size / (targets or 1)
    task_indices = torch.arange(len(task_losses), device=engine.device)[:, None]
    try:
        for i, pack in enumerate(packs):
            with timer.phase("data"):
                batch, row_tasks = to_batch(pack, engine.device)
            loss_sum, losses = engine.forward(batch, (step * len(packs) + i) * engine.dp_size + engine.dp_rank)
            engine.backward(loss_sum * loss_weight, is_last_micro_batch=i == len(packs) - 1)
            # Not index_add_, which adds in no fixed order on a GPU.
            losses = losses if batch.target_weights is None else losses * batch.target_weights
            task_losses += torch.where(row_tasks == task_indices, losses, 0.0).sum(1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if may_skip and config.ignore_cuda_oom and engine.dist_context.world_size == 1:
            engine.zero_grad()
            return False
        raise UserError(
            f"step {step + 1}: a row of {len(packs[0].input_ids)} tokens does not fit in the memory of "
            f"{engine.device}; {TRAINING_OOM_ADVICE}"
        ) from error
    return True


def to_batch(pack: Pack, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """A pack on the device, and (R,) the task of each of its targets."""
    rows = np.flatnonzero(pack.targets != IGNORE_INDEX)
    arrays = (pack.input_ids, pack.positions, pack.cu_seqlens, rows, pack.targets[rows], pack.task_ids[rows])
    ids, positions, cu_seqlens, target_positions, targets, tasks = (_on_device(array, device) for array in arrays)
    seqlens = np.diff(pack.cu_seqlens).tolist()
    weights = None if pack.target_weights is None else _on_device(pack.target_weights[rows], device)
    return Batch(ids, positions, cu_seqlens, seqlens, target_positions, targets.long(), weights), tasks


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # Only a copy from pinned memory goes on beside the computation.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _loss_metrics(tasks: list[str], engine: Engine, packs: list[Pack], task_losses: torch.Tensor) -> dict[str, float]:
    """The mean loss over all targets of a step by their weights, and over those of each task that had one."""
    counts = np.zeros(len(tasks))
    for pack in packs:
        rows = pack.targets != IGNORE_INDEX
        weights = None if pack.target_weights is None else pack.target_weights[rows]
        counts += np.bincount(pack.task_ids[rows], weights, minlength=len(tasks))
    # In one message, which the device is waited for once.
    both = torch.stack([task_losses, _on_device(counts.astype(np.float32), engine.device)])
    sums, targets = engine.dp_sum(both).tolist()
    metrics = {"Loss/train": sum(sums) / (sum(targets) or 1)}
    for task, loss, count in zip(tasks, sums, targets):
        if count:
            metrics[f"Loss/train/{task}"] = loss / count
    return metrics
