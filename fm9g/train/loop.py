"""The training loop: load a batch, forward and backward over its micro-batches, step; then log, evaluate, save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fm9g.config.train import TrainConfig
from fm9g.data.load.loader import Loader
from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.out_of_memory import TRAINING_OOM_ADVICE, is_out_of_memory
from fm9g.train.batch import sum_by_task, to_batch, to_device
from fm9g.train.callback import Callback, CallbackList
from fm9g.train.lr_schedule import learning_rate
from fm9g.train.pack_counts import count_targets_by_task, count_tokens_by_task
from fm9g.train.skipped_steps import SkippedStepDetector
from fm9g.train.state import TrainState
from fm9g.train.timer import StepTimer


@dataclass(frozen=True)
class StepResult:
    """One step on this rank, as its metrics need it. Tensors stay on the device until the step is logged.

    task_losses: (num_tasks,) sums over the targets of this rank. grad_norm: (), NaN if the step ran out of memory.
    """

    packs: list[Pack]
    task_losses: torch.Tensor
    lr: float
    grad_norm: torch.Tensor


def train(
    config: TrainConfig,
    tasks: list[str],
    engine: Engine,
    loader: Loader,
    state: TrainState,
    callbacks: Iterable[Callback],
    timer: StepTimer,
) -> None:
    """Trains from state.step until the last step, the end of the data, or a request of any rank to stop.

    tasks: names of the packs' task ids. Raises UserError if too many steps in a row were skipped.
    """
    events, control = CallbackList(callbacks), state.control
    skip_detector = SkippedStepDetector(engine, config.max_skipped_steps)
    last_saved = last_evaluated = state.step
    log_steps, eval_steps, save_steps = map(
        config.interval_steps, (config.log_iters, config.eval_iters, config.save_iters)
    )
    unlogged: StepResult | None = None
    has_fit = state.step > 0  # the steps before a resume fitted in memory
    while state.step < config.last_step and not control.should_stop:
        with timer.phase("data"):
            packs = loader.next_batch()
        events.on_step_begin(state)
        with timer.phase("communication"):  # between the hosts: no GPU is waited for
            num_targets = _agree(engine, packs, state)
        if not loader.is_infinite and num_targets == 0:
            break
        task_losses = torch.zeros(len(tasks), device=engine.device)
        may_skip = has_fit and config.ignore_cuda_oom and engine.dist_context.world_size == 1
        fits = _forward_backward(engine, packs, state.step, num_targets, task_losses, timer, may_skip)
        has_fit = has_fit or fits
        state.step += 1
        state.val_loss = None
        lr, grad_norm = learning_rate(config, state.step - 1), torch.tensor(torch.nan)
        if fits:
            events.on_before_optimizer_step(state)
            grad_norm = engine.step(lr, config.clip_grad)
            state.task_tokens += count_tokens_by_task(packs, len(tasks))
        timer.count(packs)
        events.on_step_end(state)
        skip_detector.add(state.step, packs, grad_norm, oom=not fits)

        unlogged = StepResult(packs, task_losses, lr, grad_norm)
        is_last_step = state.step == config.last_step
        should_log = state.step % log_steps == 0 or is_last_step or control.should_stop
        should_evaluate = config.evaluates and (state.step % eval_steps == 0 or is_last_step)
        should_save = state.step % save_steps == 0 or control.should_save
        _report_skipped(skip_detector, state, events, wait=should_log or should_save)
        if should_log:
            _log(unlogged, tasks, engine, state, events)
            unlogged = None
        if should_evaluate:
            with timer.phase("evaluation"):
                events.on_evaluate(state)
            last_evaluated = state.step
        if should_save and not skip_detector.consecutive:
            control.should_save = False
            with timer.phase("checkpoint"):
                events.on_save(state)
            last_saved = state.step
    if unlogged:  # the data ended, which only shows when the next batch is loaded, or an evaluation stopped the run
        _report_skipped(skip_detector, state, events, wait=True)
        _log(unlogged, tasks, engine, state, events)
    if config.evaluates and last_evaluated != state.step and not control.should_stop:  # a signal should stop soon
        events.on_evaluate(state)
    if last_saved != state.step:
        events.on_save(state)


def _agree(engine: Engine, packs: list[Pack], state: TrainState) -> float:
    """Passes a request of any rank to all. Returns the targets of the step, by weight, summed over ranks."""
    control = state.control
    num_targets, stop, save = engine.dist_context.all_reduce_sum_floats(
        [sum(pack.total_weight for pack in packs), control.should_stop, control.should_save]
    )
    control.should_stop, control.should_save = stop > 0, save > 0
    return num_targets


def _forward_backward(
    engine: Engine,
    packs: list[Pack],
    step: int,
    num_targets: float,
    task_losses: torch.Tensor,
    timer: StepTimer,
    may_skip: bool,
) -> bool:
    """Accumulates the gradients of a step. Returns False if it ran out of memory; the gradients are then cleared.

    may_skip: running out of memory is tolerated. It is not before any step has fitted, since none would, nor with
    several ranks, since the others would wait. Raises UserError then.
    """
    try:
        _accumulate(engine, packs, step, num_targets, task_losses, timer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not may_skip:
            raise UserError(
                f"step {step + 1}: a row of {len(packs[0].input_ids)} tokens does not fit in the memory of "
                f"{engine.device}; {TRAINING_OOM_ADVICE}"
            ) from error
        engine.zero_grad()
        return False
    return True


def _accumulate(
    engine: Engine, packs: list[Pack], step: int, num_targets: float, task_losses: torch.Tensor, timer: StepTimer
) -> None:
    """Adds the gradients of all micro-batches, and their losses to task_losses, (num_tasks,)."""
    # num_targets is a sum over ranks, in which all ranks of a replica count the same targets.
    loss_weight = engine.ranks_per_replica / (num_targets or 1)
    for i, pack in enumerate(packs):
        with timer.phase("data"):
            batch, target_tasks = to_batch(pack, engine.device)
        dropout_seed = (step * len(packs) + i) * engine.dp_size + engine.dp_rank
        loss_sum, losses = engine.forward(batch, dropout_seed)
        engine.backward(loss_sum * loss_weight, is_last_micro_batch=i == len(packs) - 1)
        task_losses += sum_by_task(losses, batch.target_weights, target_tasks, len(task_losses))


def _report_skipped(skip_detector: SkippedStepDetector, state: TrainState, events: Callback, wait: bool) -> None:
    """Reports skipped steps to the callbacks. Raises UserError if there are too many in a row."""
    for skipped in skip_detector.poll(wait):
        state.skipped_steps += 1
        events.on_step_skipped(state, skipped)
    skip_detector.raise_if_too_many()


def _log(result: StepResult, tasks: list[str], engine: Engine, state: TrainState, events: Callback) -> None:
    """Has the callbacks log the metrics of the step just finished. Waits for the device."""
    metrics = _loss_metrics(result, tasks, engine)
    metrics["Optimizer/lr"] = result.lr
    metrics["Optimizer/grad_norm"] = result.grad_norm.item()
    metrics["Optimizer/scale"] = engine.loss_scaler.scale
    state.loss = metrics["Loss/train"] if math.isfinite(metrics["Loss/train"]) else None
    events.on_log(state, metrics)


def _loss_metrics(result: StepResult, tasks: list[str], engine: Engine) -> dict[str, float]:
    """The mean loss over all targets of a step by their weights, and over those of each task that has any."""
    counts = count_targets_by_task(result.packs, len(tasks)).astype(np.float32)
    # (2, num_tasks) in one collective, which waits for the device once.
    both = torch.stack([result.task_losses, to_device(counts, engine.device)])
    sums, targets = engine.dp_sum(both).tolist()
    metrics = {"Loss/train": sum(sums) / (sum(targets) or 1)}
    for task, loss, count in zip(tasks, sums, targets):
        if count:
            metrics[f"Loss/train/{task}"] = loss / count
    return metrics
