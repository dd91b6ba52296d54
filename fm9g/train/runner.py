"""Runs a training from its configuration: opens the data, places the model, composes the callbacks, starts the loop."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.manager import CheckpointManager
from fm9g.checkpoint.steps import best_step, list_steps
from fm9g.config.resolved import ResolvedRun, resolve
from fm9g.config.run import RunConfig
from fm9g.data.encode.new_tokens import read_new_tokens
from fm9g.data.load.loader import Loader
from fm9g.data.load.loader_state import fingerprint
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_estimates import estimate_total_tokens
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError
from fm9g.io.atomic import check_writable, clean_stale_temps
from fm9g.io.inputs import check_output
from fm9g.io.lock import exclusive_lock
from fm9g.launch.consistency import check_same, code_fingerprint
from fm9g.launch.dist_env import RankInfo, host_name
from fm9g.launch.watchdog import Watchdog
from fm9g.log import log_only_errors
from fm9g.model.counts import adapter_weights
from fm9g.out_of_memory import TRAINING_OOM_ADVICE, oom_as_user_error
from fm9g.run_files import METRICS_FILE
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.callback import Callback
from fm9g.train.callbacks import (
    CheckpointCallback,
    EvalCallback,
    HeartbeatCallback,
    MetricsCallback,
    SignalCallback,
    SkippedBatchDump,
    WeightStatsCallback,
)
from fm9g.train.data_loading import open_loader, open_mixture
from fm9g.train.device_flops import device_name, peak_flops
from fm9g.train.evaluator import Evaluator
from fm9g.train.loop import train
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.model_setup import device_facts, engine_name, make_engine, setup_model_and_optimizer
from fm9g.train.new_tokens import grow_vocab
from fm9g.train.resume import (
    broadcast_inherited_keys,
    check_config_diff,
    find_resume_checkpoint,
    inherit_keys,
    resolve_checkpoint_paths,
    restore,
)
from fm9g.train.run_summary import package_versions, run_info, summarize
from fm9g.train.signals import SignalHandler
from fm9g.train.snapshot import SnapshotBuilder
from fm9g.train.state import TrainState
from fm9g.train.throughput import FlopsModel
from fm9g.train.timer import StepTimer
from fm9g.train.trackers import build_trackers, check_trackers_installed

logger = logging.getLogger(__name__)

_LOCK_MESSAGE = "another run of this name is writing there; wait until it ends or choose another --model_unique"
_MIN_VOCAB_SHARE = 0.95  # a model's own tokenizer has at least this share of its token ids; the rest is padding


@dataclass(frozen=True)
class TrainResult:
    """What a run produced.

    Args:
        step: finished optimizer steps of the whole run.
        tokens: tokens trained on since this start.
        seconds: duration of training since this start.
        tensorboard_dir: exists only if TensorBoard was a tracker.
        checkpoint: the last one; None if the run does not save.
        best_checkpoint: the one with the lowest validation loss; None without an evaluation.
        interrupted: a signal stopped the run.
    """

    step: int
    tokens: int
    seconds: float
    metrics_file: Path
    tensorboard_dir: Path
    checkpoint: Path | None
    best_checkpoint: Path | None
    interrupted: bool


@dataclass(frozen=True)
class _Job:
    """One run on this rank, ready for the loop.

    Args:
        checkpoint: what the run resumes from; on rank 0 only.
        loader_state: the data position to resume from; None: the start of the data.
        adapter_training: what is trained and saved in place of the model.
    """

    resolved: ResolvedRun
    engine: Engine
    watchdog: Watchdog
    mixture: Mixture
    evaluator: Evaluator | None
    checkpoint: Checkpoint | None
    adapter_training: AdapterTraining | None
    state: TrainState
    loader_state: dict[str, Any] | None

    @property
    def is_rank_zero(self) -> bool:
        return self.engine.dist_context.rank == 0


def run_training(run: RunConfig, rank_info: RankInfo | None = None) -> TrainResult:
    """Trains as configured. All ranks return the same result.

    Args:
        rank_info: this process among those of the run; None: it is alone.

    Raises:
        UserError: a mistake of the user.
    """
    config = run.train
    rank_info = rank_info or RankInfo(timeout=config.timeout, step_timeout=config.step_timeout)
    if rank_info.rank:
        log_only_errors()
    folders = config.folders
    with (
        Watchdog(rank_info, folders.logs) as watchdog,
        _init_distributed(run, rank_info, watchdog) as dist_context,
        contextlib.ExitStack() as locks,
    ):
        if rank_info.rank == 0:  # against a second run of this name
            for folder in (folders.checkpoints, folders.logs) if config.save else (folders.logs,):
                locks.enter_context(exclusive_lock(folder, 10.0, _LOCK_MESSAGE))
        with oom_as_user_error(TRAINING_OOM_ADVICE):
            job = _prepare(run, rank_info, watchdog, make_engine(config, dist_context))
            return _train(job, rank_info)


def _init_distributed(run: RunConfig, rank_info: RankInfo, watchdog: Watchdog) -> DistContext:
    config, use_nccl = run.train, engine_name(run.train) == "torch"
    if not use_nccl and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("engine: bmtrain needs NVIDIA GPUs, and this is a CPU; use --engine torch")
    store = watchdog.create_torch_store() if rank_info.world_size > 1 else None
    ranks = rank_info.rank, rank_info.world_size, rank_info.local_rank, rank_info.local_world_size
    return DistContext(config.device, *ranks, store, use_nccl)


def _prepare(run: RunConfig, rank_info: RankInfo, watchdog: Watchdog, engine: Engine) -> _Job:
    """Finds the checkpoint, opens the data and places the model; checks the user's input on the way."""
    dist_context = engine.dist_context
    checkpoint = None
    if dist_context.rank == 0:
        run, checkpoint = _prepare_resume(run, rank_info)
    run = broadcast_inherited_keys(run, dist_context)
    resolved = resolve(run, dist_context.world_size, device_facts(engine.device))

    watchdog.report_progress(0, "reading the data")
    date = dist_context.broadcast_object(_template_date(checkpoint))  # one day for all, whatever their clocks say
    mixture = _open_mixture_rank_zero_first(run, rank_info, dist_context, date)
    resolved = replace(resolved, run=grow_vocab(_with_train_iters(resolved, mixture), mixture.tokenizer))
    run = resolved.run
    _check_ranks_agree(resolved, dist_context, mixture)
    _check_vocab_size(run, mixture)
    evaluator = Evaluator(run, engine, mixture) if run.validation else None

    watchdog.report_progress(0, "building the model")
    adapter_training = setup_model_and_optimizer(engine, run.train, run.model, checkpoint, mixture.tokenizer)
    if evaluator:
        evaluator.prepare()
    tasks = [dataset.task_name for dataset in run.mixture]
    state, loader_state = restore(engine, run.train, checkpoint, tasks, adapter_training)
    return _Job(resolved, engine, watchdog, mixture, evaluator, checkpoint, adapter_training, state, loader_state)


def _train(job: _Job, rank_info: RankInfo) -> TrainResult:
    run, engine, state = job.resolved.run, job.engine, job.state
    config, dist_context, folders = run.train, engine.dist_context, run.train.folders
    summary, start = _log_start(job)
    devices = Counter(dist_context.all_gather_object(device_name(engine.device)))
    timer = StepTimer(run.model.windows)
    with (
        open_loader(config, job.mixture, engine.dp_rank, engine.dp_size, job.loader_state) as loader,
        _open_metrics_logger(job) as metrics_logger,
        SignalHandler() as signal_handler,
    ):
        if metrics_logger:
            validation = job.evaluator.mixture if job.evaluator else None
            metrics_logger.write_run_info(run_info(job.resolved, job.mixture, validation, summary))
            kind = "resume" if job.checkpoint else "start"
            metrics_logger.record_event(state.step, kind, start, devices=devices)
        manager = _make_checkpoint_manager(job, metrics_logger)
        callbacks = _make_callbacks(job, loader, timer, signal_handler, manager, metrics_logger)
        started, first_step, tokens_before = time.monotonic(), state.step, int(state.task_tokens.sum())
        try:
            train(config, [dataset.task_name for dataset in run.mixture], engine, loader, state, callbacks, timer)
            job.watchdog.report_progress(state.step, "saving")
            manager.wait()
        except BaseException:
            manager.wait(rank_info.timeout)  # a checkpoint that is nearly written is worth a moment
            raise
        job.watchdog.report_progress(state.step, "ending")
        seconds = time.monotonic() - started
        counts = [int(state.task_tokens.sum()) - tokens_before, signal_handler.stop_requested]
        tokens, stopped = dist_context.all_reduce_sum(counts)
        _log_skipped_records(engine, loader)
        if metrics_logger:
            text = f"stopped by a signal after {seconds:.0f} s" if stopped else f"ended after {seconds:.0f} s"
            metrics_logger.log_event(state.step, "signal" if stopped else "end", text)
    if not stopped:
        _check_trained(state.step, first_step, tokens)
    _check_saved(manager, folders.checkpoints)
    best = best_step(folders.checkpoints) if job.is_rank_zero and config.save else None
    best = dist_context.broadcast_object(best)
    return TrainResult(
        step=state.step,
        tokens=tokens // engine.ranks_per_replica,
        seconds=seconds,
        metrics_file=folders.logs / METRICS_FILE,
        tensorboard_dir=folders.tensorboard,
        checkpoint=folders.checkpoints / str(state.step) if config.save and state.step else None,
        best_checkpoint=None if best is None else folders.checkpoints / str(best),
        interrupted=bool(stopped),
    )


def _prepare_resume(run: RunConfig, rank_info: RankInfo) -> tuple[RunConfig, Checkpoint | None]:
    """On rank 0: the checkpoint to resume from, and the run with the keys that it inherits."""
    check_trackers_installed(run.train.trackers)
    for folder in (run.train.folders.checkpoints, run.train.folders.logs):
        clean_stale_temps(folder)
    checkpoint = find_resume_checkpoint(run.train, rank_info, run.train.folders)
    run = inherit_keys(resolve_checkpoint_paths(run), checkpoint)
    if checkpoint:
        check_config_diff(run, checkpoint)
    return run, checkpoint


def _template_date(checkpoint: Checkpoint | None) -> str:
    """The date that templates insert as today's: that of the checkpoint, or today."""
    saved = checkpoint.loader_state().get("fingerprint", {}) if checkpoint else {}
    return saved.get("template_date") or datetime.date.today().isoformat()


def _open_mixture_rank_zero_first(run: RunConfig, rank_info: RankInfo, dist_context: DistContext, date: str) -> Mixture:
    """Opens the data on all ranks. With token caches, rank 0 builds them first, then one process of each other machine,
    which finds them already there if the folder is shared."""
    file = run.train.new_tokens  # on rank 0, which may have it from a checkpoint of its machine
    new_tokens = dist_context.broadcast_object(read_new_tokens(file) if file and rank_info.rank == 0 else ())
    turn = 0 if rank_info.rank == 0 else 1 if rank_info.local_rank == 0 else 2
    turns = 3 if run.train.token_cache_dir else 1
    for now in range(turns):
        if now == min(turn, turns - 1):
            mixture = open_mixture(run, date, new_tokens)
        dist_context.all_reduce_sum([0])  # a barrier
    return mixture


def _with_train_iters(resolved: ResolvedRun, mixture: Mixture) -> RunConfig:
    """The run with the train_iters that its `epochs` take."""
    run = resolved.run
    if not run.train.epochs:
        return run
    if run.train.packing:
        tokens = estimate_total_tokens(mixture)
        iters, size = run.train.iters_for_epochs(tokens, resolved.tokens_per_step), f"about {tokens:.0f} tokens"
    else:
        records = sum(map(len, mixture.datasets))
        iters, size = run.train.iters_for_records(records, resolved.layout.packs_per_step), f"{records} records"
    logger.info(f"epochs {run.train.epochs:g}: train_iters {iters}; an epoch has {size}")
    return run.changed("train", {"train_iters": iters}, run.origins["train"]["epochs"])


def _check_ranks_agree(resolved: ResolvedRun, dist_context: DistContext, mixture: Mixture) -> None:
    """Raises UserError naming a process whose code, packages, configuration or data differ from those of rank 0."""
    mine = {
        "code": code_fingerprint(),
        "packages": package_versions(),
        "config": resolved.run.fingerprint(),
        "data": fingerprint(mixture, resolved.layout.packs_per_step),
    }
    check_same(dist_context.all_gather_object(mine), dist_context.all_gather_object(host_name()))


def _check_vocab_size(run: RunConfig, mixture: Mixture) -> None:
    """Raises UserError if the tokenizer has more tokens than the model; warns if it has far fewer."""
    config, model, tokenizer_size = run.train, run.model, mixture.tokenizer.vocab_size
    if tokenizer_size > model.vocab_size:
        raise UserError(
            f"tokenizer_path: {config.tokenizer_path} has {tokenizer_size} tokens, the model's "
            f"vocab_size is {model.vocab_size}; they do not belong together"
        )
    if config.max_length > model.max_length:
        logger.warning(f"max_length {config.max_length} is more than that of the model, {model.max_length}")
    if tokenizer_size < _MIN_VOCAB_SHARE * model.vocab_size and config.pretrained_model:
        logger.warning(
            f"tokenizer_path {config.tokenizer_path} has {tokenizer_size} of the model's {model.vocab_size} token ids; "
            f"is it the tokenizer of {config.pretrained_model}?"
        )


def _log_start(job: _Job) -> tuple[str, str]:
    """Logs what the run is and where it starts; returns both texts. Rank 0 also checks its checkpoint folder."""
    config, checkpoint_dir = job.resolved.run.train, job.resolved.run.train.folders.checkpoints
    summary = summarize(job.resolved, job.engine, job.mixture)
    start = f"starting at step {job.state.step}"
    if job.checkpoint:
        start = f"resuming from {job.checkpoint.folder}"
    if job.state.step >= config.last_step:
        logger.warning(f"there is nothing to do: step {job.state.step}, train_iters {config.train_iters}")
    logger.info(f"{summary}\n{start}")
    if job.is_rank_zero and config.save:
        check_writable(checkpoint_dir)
        if not job.checkpoint:
            for step in list_steps(checkpoint_dir):  # deleted after the first save
                check_output(checkpoint_dir / str(step))
    return summary, start


@contextlib.contextmanager
def _open_metrics_logger(job: _Job) -> Iterator[MetricsLogger | None]:
    """The metrics logger of rank 0; None on other ranks."""
    if not job.is_rank_zero:
        yield None
        return
    run, step = job.resolved.run, job.state.step
    config, folders = run.train, run.train.folders
    values = {key: value for key, value, _ in run.rows("train")}
    project = config.exp_group or "fm9g"
    trackers = build_trackers(config.trackers, folders, project, config.model_unique, values, step)
    with MetricsLogger(
        folders.logs, trackers, step, config.train_iters, config.tensorboard_all_tasks, config.loss_spike_sigmas
    ) as metrics_logger:
        yield metrics_logger


def _make_checkpoint_manager(job: _Job, metrics_logger: MetricsLogger | None) -> CheckpointManager:
    """The manager of the run's checkpoints, with those of earlier runs that it replaces."""
    config, checkpoint_dir = job.resolved.run.train, job.resolved.run.train.folders.checkpoints
    existing = list_steps(checkpoint_dir) if job.is_rank_zero and config.save else []
    abandoned = [step for step in existing if job.checkpoint and step > job.state.step]
    if abandoned:
        steps = ", ".join(map(str, abandoned))
        logger.info(f"checkpoints of later steps ({steps}) become STEP.abandoned when this run saves its first")
    return CheckpointManager(
        checkpoint_dir,
        is_rank_zero=job.is_rank_zero,
        async_save=config.async_save,
        max_to_keep=config.save_total_limit,
        obsolete_steps=[] if job.checkpoint else existing,
        abandoned_steps=abandoned,
        on_event=metrics_logger.log_event if metrics_logger else _ignore_event,
    )


def _ignore_event(step: int, kind: str, text: str) -> None: ...


def _make_callbacks(
    job: _Job,
    loader: Loader,
    timer: StepTimer,
    signal_handler: SignalHandler,
    manager: CheckpointManager,
    metrics_logger: MetricsLogger | None,
) -> list[Callback]:
    run, engine, mixture = job.resolved.run, job.engine, job.mixture
    config, log_dir = run.train, run.train.folders.logs
    flops = FlopsModel(
        run.model,
        adapter_weights(run.model, config.lora_layer, config.lora_r),
        config.peak_tflops * 1e12 or peak_flops(engine.device, job.resolved.dtype),
    )
    callbacks: list[Callback] = [
        HeartbeatCallback(job.watchdog),
        SignalCallback(signal_handler),
        MetricsCallback(engine, loader, mixture, timer, flops, metrics_logger),
        SkippedBatchDump(log_dir, mixture, engine.dist_context.rank, metrics_logger),
    ]
    if config.inspect_iters:
        callbacks.append(WeightStatsCallback(config.inspect_iters, engine, metrics_logger))
    if job.evaluator:
        callbacks.append(EvalCallback(job.evaluator, config.early_stopping_patience, metrics_logger))
    if config.save:
        snapshots = SnapshotBuilder(run, engine, loader, mixture, job.adapter_training)
        callbacks.append(CheckpointCallback(manager, snapshots))
    return callbacks


def _log_skipped_records(engine: Engine, loader: Loader) -> None:
    """Warns about the records that gave no sample. All ranks must take part."""
    skipped = sum(map(Counter, engine.dist_context.all_gather_object(loader.skipped())), Counter[str]())
    for reason, count in skipped.items():
        logger.warning(f"{count // engine.ranks_per_replica} records were not trained on: {reason}")


def _check_trained(step: int, first_step: int, tokens: int) -> None:
    """Raises UserError if a run that reached its end has trained on nothing.

    Args:
        step, first_step: finished steps now, and at this start.
        tokens: trained on since this start, by all processes.
    """
    if step == 0:
        raise UserError("nothing was trained on: no record of the mixture gave a sample")
    if step > first_step and not tokens:
        raise UserError(
            f"nothing was trained on in {step - first_step} steps: no record gave a sample; raise max_length, or "
            "inspect the records with `fm9g data show`"
        )


def _check_saved(manager: CheckpointManager, checkpoint_dir: Path) -> None:
    """Raises UserError if the last checkpoint is missing."""
    if manager.failure:
        saved = manager.last_saved_step
        last = f"{checkpoint_dir / str(saved)}" if saved else "none since this start"
        raise UserError(f"the last checkpoint could not be written (the last good one: {last}): {manager.failure}")
