"""One run from its configuration: puts the rooms together, and nothing else does."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import Counter
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.checkpoint import Checkpoint, best_step, list_steps
from fm9g.checkpoint.manager import CheckpointManager
from fm9g.config.load import COMMAND_LINE, Resolved
from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.load.loader_state import fingerprint
from fm9g.data.load.mixture import Mixture
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError
from fm9g.io.atomic import check_writable, clean_stale_temps, exclusive_lock
from fm9g.io.inputs import check_output
from fm9g.launch.consistency import check_same, code_fingerprint
from fm9g.launch.dist_env import RankInfo, host_name
from fm9g.launch.watchdog import Watchdog
from fm9g.memory import TRAINING_OOM_ADVICE, oom_as_user_error
from fm9g.model.transformer import weight_shapes
from fm9g.printable import printable
from fm9g.report.files import METRICS_FILE
from fm9g.train.callbacks import RunCallbacks
from fm9g.train.data_loading import open_loader, open_mixture
from fm9g.train.device_flops import device_name, peak_flops
from fm9g.train.evaluator import Evaluator
from fm9g.train.loop import train
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.model_setup import compute_dtype, engine_name, make_engine, setup_model_and_optimizer
from fm9g.train.resume import (
    broadcast_adapter_keys,
    config_diff,
    find_resume_checkpoint,
    inherit_keys,
    resolve_checkpoint_paths,
    restore,
)
from fm9g.train.signals import SignalHandler
from fm9g.train.timer import StepTimer
from fm9g.train.trackers import build_trackers, check_trackers_installed

_PINNED_PACKAGES = ("torch", "numpy", "tokenizers")  # that must be the same in all processes
_MIN_VOCAB_SHARE = 0.95  # a model's own tokenizer has at least this share of its token ids; the rest is padding


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind. checkpoint: None where it was told not to save. best_checkpoint: of its checkpoints the
    one with the lowest validation loss; None where none was evaluated. interrupted: by a signal."""

    step: int
    tokens: int
    seconds: float
    metrics_file: Path
    tensorboard_dir: Path
    checkpoint: Path | None
    best_checkpoint: Path | None
    interrupted: bool


def run_training(run: RunConfig, rank_info: RankInfo | None = None) -> TrainResult:
    """Trains as configured and returns where everything is. Raises UserError.

    rank_info: of this process among those of the run; None: it is alone. All of them return the same.
    """
    rank_info = rank_info or RankInfo(timeout=run.train.value.timeout, step_timeout=run.train.value.step_timeout)
    log_dir = Path(run.train.value.output_dir) / "logs" / f"{run.train.value.exp_group}{run.train.value.model_unique}"
    with (
        Watchdog(rank_info, log_dir) as watchdog,
        _init_distributed(run, rank_info, watchdog) as dist_context,
        contextlib.ExitStack() as locks,
    ):
        if rank_info.rank == 0:  # against a second run of this name
            checkpoint_dir = Path(run.train.value.output_dir) / "checkpoints" / run.train.value.model_unique
            for folder in (checkpoint_dir, log_dir) if run.train.value.save else (log_dir,):
                locks.enter_context(exclusive_lock(folder, timeout=10.0))
        with oom_as_user_error(TRAINING_OOM_ADVICE):
            return _train(run, rank_info, watchdog, make_engine(run.train.value, dist_context), log_dir)


def _init_distributed(run: RunConfig, rank_info: RankInfo, watchdog: Watchdog) -> DistContext:
    config = run.train.value
    if not (nccl := engine_name(config) == "torch") and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("engine: bmtrain needs NVIDIA GPUs, and this is a CPU; use --engine torch")
    store = watchdog.create_torch_store() if rank_info.world_size > 1 else None
    return DistContext(
        config.device,
        rank_info.rank,
        rank_info.world_size,
        rank_info.local_rank,
        rank_info.local_world_size,
        store,
        nccl,
    )


def _train(run: RunConfig, rank_info: RankInfo, watchdog: Watchdog, engine: Engine, log_dir: Path) -> TrainResult:
    config, dist_context = run.train.value, engine.dist_context
    is_rank_zero = dist_context.rank == 0
    output_dir, name = Path(config.output_dir), config.model_unique
    checkpoint_dir, tensorboard_dir = (
        output_dir / "checkpoints" / name,
        output_dir / "tensorboard" / f"{config.exp_group}{name}",
    )
    run, checkpoint, notes = (
        _prepare_resume(run, rank_info, checkpoint_dir, log_dir) if is_rank_zero else (run, None, [])
    )
    run = broadcast_adapter_keys(run, dist_context)
    config = run.train.value
    dp_size = config.dp_size(dist_context.world_size)
    packs_per_step = config.packs_per_step(dp_size)

    watchdog.report_progress(0, "reading the data")
    date = dist_context.broadcast_object(
        _template_date(checkpoint) if is_rank_zero else ""
    )  # one day for all, whatever their clocks say
    mixture, about_data = _open_mixture_rank_zero_first(run, rank_info, dist_context, date)
    run, about_epochs = _resolve_train_iters(run, mixture, packs_per_step)
    config = run.train.value
    _check_ranks_agree(run, dist_context, fingerprint(mixture, packs_per_step))
    evaluator = Evaluator(run, engine, mixture) if run.validation else None
    notes += about_data + about_epochs + _check_vocab_size(config, run.model.value, mixture)
    watchdog.report_progress(0, "building the model")
    about_weights, adapter_training = setup_model_and_optimizer(engine, config, run.model.value, checkpoint)
    notes += about_weights
    if evaluator:
        evaluator.load_packs()  # now: a mistake in its data is not to end a run that is under way
    tasks = [item.value.task_name for item in run.mixture]
    state, position = restore(engine, config, checkpoint, tasks, adapter_training)
    summary = _summary(run, engine, mixture, packs_per_step)
    start = f"resuming from {checkpoint.folder}" if checkpoint else f"starting at step {state.step}"
    if state.step >= config.last_step:
        notes.append(f"nothing is left to do: step {state.step}, train_iters {config.train_iters}")
    if is_rank_zero:
        print("\n".join([*(f"note: {printable(note)}" for note in notes), summary, start]))
        if config.save:
            check_writable(checkpoint_dir)
            for step in [] if checkpoint else list_steps(checkpoint_dir):  # they go when this run saves its first
                check_output(checkpoint_dir / str(step))
    dtype, _ = compute_dtype(run.model.value, engine.device)
    device_peak = config.peak_tflops * 1e12 or peak_flops(engine.device, dtype)
    devices = Counter(dist_context.all_gather_object(device_name(engine.device)))
    with (
        open_loader(config, mixture, engine.dp_rank, dp_size, position) as loader,
        _open_metrics_logger(run, tensorboard_dir, log_dir, state.step)
        if is_rank_zero
        else contextlib.nullcontext() as metrics_logger,
        SignalHandler() as signal_handler,
    ):
        if metrics_logger:
            for note in loader.notes:
                print(f"note: {printable(note)}")
            metrics_logger.write_run_info(_run_info(run, mixture, evaluator, summary))
            metrics_logger.record_event(state.step, "resume" if checkpoint else "start", start, devices=devices)
        checkpoint_manager = _make_checkpoint_manager(
            config, checkpoint_dir, state.step, bool(checkpoint), metrics_logger
        )
        callbacks = RunCallbacks(
            run,
            engine,
            mixture,
            loader,
            state,
            metrics_logger=metrics_logger,
            checkpoint_manager=checkpoint_manager,
            evaluator=evaluator,
            adapter_training=adapter_training,
            watchdog=watchdog,
            signal_handler=signal_handler,
            peak_flops=device_peak,
            log_dir=log_dir,
        )
        started, tokens_before = time.monotonic(), state.task_tokens.sum()
        try:
            train(config, tasks, engine, loader, state, callbacks, StepTimer(run.model.value.windows))
            watchdog.report_progress(state.step, "saving")
            checkpoint_manager.wait()
        except BaseException:
            checkpoint_manager.wait(rank_info.timeout)  # a checkpoint that is nearly written is worth a moment
            raise
        watchdog.report_progress(state.step, "ending")
        seconds = time.monotonic() - started
        tokens, stopped = dist_context.all_reduce_sum(
            [int(state.task_tokens.sum() - tokens_before), signal_handler.stop_requested]
        )
        skipped = sum(map(Counter, dist_context.all_gather_object(loader.skipped())), Counter[str]())
        if metrics_logger:
            for reason, count in skipped.items():
                print(f"note: {count // config.tp_size} records were not trained on: {printable(reason)}")
            text = f"stopped by a signal after {seconds:.0f} s" if stopped else f"ended after {seconds:.0f} s"
            metrics_logger.log_event(state.step, "signal" if stopped else "end", text)
    if state.step == 0 and not stopped:
        raise UserError("nothing was trained on: no record of the mixture gave a sample")
    if checkpoint_manager.failure:
        last = (
            f"{checkpoint_dir / str(checkpoint_manager.last_saved_step)}"
            if checkpoint_manager.last_saved_step
            else "none of this session"
        )
        raise UserError(
            f"the last checkpoint could not be written (the last good one: {last}): {checkpoint_manager.failure}"
        )
    best = dist_context.broadcast_object(best_step(checkpoint_dir) if is_rank_zero and config.save else None)
    return TrainResult(
        step=state.step,
        tokens=tokens // config.tp_size,
        seconds=seconds,
        metrics_file=log_dir / METRICS_FILE,
        tensorboard_dir=tensorboard_dir,
        checkpoint=checkpoint_dir / str(state.step) if config.save and state.step else None,
        best_checkpoint=None if best is None else checkpoint_dir / str(best),
        interrupted=bool(stopped),
    )


def _prepare_resume(
    run: RunConfig, rank_info: RankInfo, checkpoint_dir: Path, log_dir: Path
) -> tuple[RunConfig, Checkpoint | None, list[str]]:
    """On rank 0, the run with the keys of its adapters, what it goes on from, and what there is to know, a line each.
    Leftovers of killed runs go."""
    check_trackers_installed(run.train.value.trackers)
    for folder in (checkpoint_dir, log_dir):
        clean_stale_temps(folder)
    checkpoint, notes = find_resume_checkpoint(run.train.value, rank_info, checkpoint_dir, log_dir)
    run, about_keys = inherit_keys(resolve_checkpoint_paths(run), checkpoint)
    return run, checkpoint, notes + about_keys + (config_diff(run, checkpoint) if checkpoint else [])


def _template_date(checkpoint: Checkpoint | None) -> str:
    """The day that templates write as today's: the one of the checkpoint, or today."""
    made_with = checkpoint.loader_state().get("fingerprint", {}) if checkpoint else {}
    return made_with.get("template_date") or datetime.date.today().isoformat()


def _make_checkpoint_manager(
    config: TrainConfig, checkpoint_dir: Path, step: int, resumed: bool, metrics_logger: MetricsLogger | None
) -> CheckpointManager:
    """Writes the run's checkpoints. metrics_logger: on rank 0, which alone knows whether the run was resumed."""
    there = list_steps(checkpoint_dir) if metrics_logger and config.save else []
    abandoned = [later for later in there if resumed and later > step]
    if abandoned:
        named = ", ".join(map(str, abandoned))
        print(f"note: checkpoints of later steps ({named}) become STEP.left when this run saves its first")
    return CheckpointManager(
        checkpoint_dir,
        is_rank_zero=metrics_logger is not None,
        async_save=config.async_save,
        max_to_keep=config.save_total_limit,
        obsolete_steps=[] if resumed else there,
        abandoned_steps=abandoned,
        on_event=metrics_logger.log_event if metrics_logger else _noop,
    )


def _noop(step: int, kind: str, text: str) -> None: ...


def _open_metrics_logger(run: RunConfig, tensorboard_dir: Path, log_dir: Path, step: int) -> MetricsLogger:
    config = run.train.value
    values = {key: item["value"] for key, item in run.to_json()["train"].items()}
    project = config.exp_group or "fm9g"
    trackers = build_trackers(config.trackers, tensorboard_dir, log_dir, project, config.model_unique, values, step)
    return MetricsLogger(
        log_dir, trackers, step, config.train_iters, config.tensorboard_all_tasks, config.loss_spike_sigmas
    )


def _run_info(run: RunConfig, mixture: Mixture, evaluator: Evaluator | None, summary: str) -> dict[str, Any]:
    """What reports say of a run."""
    shares = [
        {"share": share, "tokens_a_sample": mean} for share, mean in zip(mixture.proportions(), mixture.mean_tokens())
    ]
    return {
        "config": run.to_json(),
        "data": [{**about, **share} for about, share in zip(_dataset_info(mixture), shares)],
        "validation": _dataset_info(evaluator.mixture) if evaluator else [],
        "summary": summary,
        "versions": {name: version(name) for name in _PINNED_PACKAGES},
    }


def _dataset_info(mixture: Mixture) -> list[dict[str, Any]]:
    return [
        {
            "task": config.task_name,
            "path": config.path,
            "records": len(dataset),
            "template": config.chat_template,
            "loss": config.train_on,
        }
        for config, dataset in zip(mixture.configs, mixture.datasets)
    ]


def _resolve_train_iters(run: RunConfig, mixture: Mixture, packs_per_step: int) -> tuple[RunConfig, list[str]]:
    """The run with the train_iters that its `epochs` take, and a line that says so."""
    config = run.train.value
    if not config.epochs:
        return run, []
    tokens = mixture.count_tokens()
    iters = config.iters_for_epochs(tokens, config.batch_size * config.max_length * packs_per_step)
    origins = run.train.origins | {"train_iters": run.train.origins["epochs"]}
    train = Resolved(replace(config, train_iters=iters), origins)
    return replace(run, train=train), [
        f"epochs {config.epochs:g}: train_iters {iters}; an epoch has about {tokens:.0f} tokens"
    ]


def _open_mixture_rank_zero_first(
    run: RunConfig, rank_info: RankInfo, dist_context: DistContext, date: str
) -> tuple[Mixture, list[str]]:
    """The data of a run. Where token caches are made, one process of each machine makes them, the first machine's
    first: the folder may be shared.
    """
    turn = 0 if rank_info.rank == 0 else 1 if rank_info.local_rank == 0 else 2
    turns = 3 if run.train.value.token_cache_dir else 1
    for now in range(turns):
        if now == min(turn, turns - 1):
            opened = open_mixture(run, date)
        dist_context.all_reduce_sum([0])  # wait for the others
    return opened


def _check_ranks_agree(run: RunConfig, dist_context: DistContext, data: dict[str, Any]) -> None:
    """Raises UserError that names a process whose code, packages, configuration or data are not rank 0's."""
    packages = {name: version(name) for name in _PINNED_PACKAGES}
    mine = {"code": code_fingerprint(), "packages": packages, "config": run.fingerprint(), "data": data}
    check_same(dist_context.all_gather_object(mine), dist_context.all_gather_object(host_name()))


def _summary(run: RunConfig, engine: Engine, mixture: Mixture, packs_per_step: int) -> str:
    config, model = run.train.value, run.model.value
    weights = sum(shape.numel() for shape in weight_shapes(model).values())
    data = ", ".join(f"{c.task_name} ({size} records)" for c, size in zip(mixture.configs, map(len, mixture.datasets)))
    dtype = str(compute_dtype(model, engine.device)[0]).removeprefix("torch.")
    count = engine.dist_context.world_size
    where = f"{engine.device.type}, {count} processes, {engine_name(config)}" if count > 1 else str(engine.device)
    summary = f"{weights:,} parameters, {dtype} on {where}; data: {data}"
    return "\n".join([summary, _tokens_per_step(run, packs_per_step), *mixture.describe()])


def _tokens_per_step(run: RunConfig, packs_per_step: int) -> str:
    """How many there are and how they come about; where from, for what is not of the command line."""
    config, origins = run.train.value, run.train.origins
    dp_size = packs_per_step // config.gradient_accumulation_steps
    keys = [
        "batch_size",
        "max_length",
        "global_batch_size" if config.global_batch_size else "gradient_accumulation_steps",
    ]
    factors = []
    for key in keys:
        origin = "" if origins[key] == COMMAND_LINE else f" ({origins[key]})"
        factors.append(f"{key} {getattr(config, key)}{origin}")
    if dp_size > 1 and not config.global_batch_size:
        factors.append(f"{dp_size} replicas of the model")
    return f"{config.batch_size * config.max_length * packs_per_step} tokens per step: {' x '.join(factors)}"


def _check_vocab_size(config: TrainConfig, model: ModelConfig, mixture: Mixture) -> list[str]:
    """Raises UserError where tokenizer and model do not fit; returns what may be meant, a line each."""
    if mixture.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer_path: {config.tokenizer_path} has {mixture.tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {model.vocab_size}; they do not belong together"
        )
    notes = []
    if config.max_length > model.max_length:
        notes.append(f"max_length {config.max_length} is more than the model is made for ({model.max_length})")
    if mixture.tokenizer.vocab_size < _MIN_VOCAB_SHARE * model.vocab_size and config.pretrained_model:
        notes.append(
            f"tokenizer_path {config.tokenizer_path} has {mixture.tokenizer.vocab_size} of the model's "
            f"{model.vocab_size} token ids; is it the tokenizer of {config.pretrained_model}?"
        )
    return notes
