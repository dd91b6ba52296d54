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

from fm9g.checkpoint.folder import Checkpoint, best_step, steps_in
from fm9g.checkpoint.saver import Saver
from fm9g.config.load import COMMAND_LINE, Loaded
from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.mixture import Mixture
from fm9g.data.position import fingerprint
from fm9g.engine.base import Engine
from fm9g.engine.processes import Processes
from fm9g.errors import UserError
from fm9g.files import only_one, probe_writable, sweep
from fm9g.inputs import check_output
from fm9g.launch.agree import check_same, code_identity
from fm9g.launch.monitor import Monitor
from fm9g.launch.place import Place, host_name
from fm9g.memory import TRAINING_ADVICE, memory_as_user_error
from fm9g.model.transformer import weight_shapes
from fm9g.printable import printable
from fm9g.report.files import METRICS_FILE
from fm9g.train.build import build_model, compute_dtype, engine_name, make_engine
from fm9g.train.clock import Clock
from fm9g.train.data import open_loader, open_mixture
from fm9g.train.desk import RunDesk
from fm9g.train.evaluate import Evaluation
from fm9g.train.interrupt import Interrupt
from fm9g.train.loop import train
from fm9g.train.metrics import Metrics
from fm9g.train.peak import device_name, peak_flops
from fm9g.train.resume import changes, find_checkpoint, restore, settle_keys, share_keys, with_paths
from fm9g.train.sinks import open_sinks, require_sinks

PACKAGES = ("torch", "numpy", "tokenizers")  # that must be the same in all processes
_LIKELY_OWN = 0.95  # a model's own tokenizer has at least this share of its token ids; the rest is padding


@dataclass(frozen=True)
class Result:
    """What a run left behind. checkpoint: None where it was told not to save. best: of its checkpoints the one with the
    lowest validation loss; None where none was evaluated. interrupted: by a signal."""

    step: int
    tokens: int
    seconds: float
    metrics_file: Path
    tensorboard: Path
    checkpoint: Path | None
    best: Path | None
    interrupted: bool


def run_training(run: RunConfig, place: Place | None = None) -> Result:
    """Trains as configured and returns where everything is. Raises UserError.

    place: of this process among those of the run; None: it is alone. All of them return the same.
    """
    place = place or Place(timeout=run.train.value.timeout, step_timeout=run.train.value.step_timeout)
    log = Path(run.train.value.output_dir) / "logs" / f"{run.train.value.exp_group}{run.train.value.model_unique}"
    with Monitor(place, log) as monitor, _join(run, place, monitor) as processes, contextlib.ExitStack() as held:
        if place.rank == 0:  # against a second run of this name
            root = Path(run.train.value.output_dir) / "checkpoints" / run.train.value.model_unique
            for folder in (root, log) if run.train.value.save else (log,):
                held.enter_context(only_one(folder, patience=10.0))
        with memory_as_user_error(TRAINING_ADVICE):
            return _train(run, place, monitor, make_engine(run.train.value, processes), log)


def _join(run: RunConfig, place: Place, monitor: Monitor) -> Processes:
    config = run.train.value
    if not (nccl := engine_name(config) == "torch") and (config.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("engine: bmtrain needs NVIDIA GPUs, and this is a CPU; use --engine torch")
    store = monitor.store() if place.world_size > 1 else None
    return Processes(config.device, place.rank, place.world_size, place.local_rank, place.local_world_size, store, nccl)


def _train(run: RunConfig, place: Place, monitor: Monitor, engine: Engine, log: Path) -> Result:
    config, processes = run.train.value, engine.processes
    first = processes.rank == 0
    base, name = Path(config.output_dir), config.model_unique
    root, tensorboard = base / "checkpoints" / name, base / "tensorboard" / f"{config.exp_group}{name}"
    run, checkpoint, notes = _look_around(run, place, root, log) if first else (run, None, [])
    run = share_keys(run, processes)
    config = run.train.value
    replicas = config.replicas(processes.world_size)
    packs = config.packs_a_step(replicas)

    monitor.progress(0, "reading the data")
    date = processes.from_first(_first_day(checkpoint) if first else "")  # one day for all, whatever their clocks say
    mixture, about_data = _open_in_turn(run, place, processes, date)
    run, about_epochs = _with_epochs(run, mixture, packs)
    config = run.train.value
    _check_same(run, processes, fingerprint(mixture, packs))
    evaluation = Evaluation(run, engine, mixture) if run.validation else None
    notes += about_data + about_epochs + _check_fit(config, run.model.value, mixture)
    monitor.progress(0, "building the model")
    about_weights, adapters = build_model(engine, config, run.model.value, checkpoint)
    notes += about_weights
    if evaluation:
        evaluation.read()  # now: a mistake in its data is not to end a run that is under way
    tasks = [item.value.task_name for item in run.mixture]
    state, position = restore(engine, config, checkpoint, tasks, adapters)
    summary = _summary(run, engine, mixture, packs)
    start = f"resuming from {checkpoint.folder}" if checkpoint else f"starting at step {state.step}"
    if state.step >= config.last_step:
        notes.append(f"nothing is left to do: step {state.step}, train_iters {config.train_iters}")
    if first:
        print("\n".join([*(f"note: {printable(note)}" for note in notes), summary, start]))
        if config.save:
            probe_writable(root)
            for step in [] if checkpoint else steps_in(root):  # they go when this run saves its first
                check_output(root / str(step))
    dtype, _ = compute_dtype(run.model.value, engine.device)
    peak = config.peak_tflops * 1e12 or peak_flops(engine.device, dtype)
    devices = Counter(processes.gather(device_name(engine.device)))
    with (
        open_loader(config, mixture, engine.replica, replicas, position) as loader,
        _open_metrics(run, tensorboard, log, state.step) if first else contextlib.nullcontext() as metrics,
        Interrupt() as interrupt,
    ):
        if metrics:
            for note in loader.notes:
                print(f"note: {printable(note)}")
            metrics.describe(_description(run, mixture, evaluation, summary))
            metrics.record(state.step, "resume" if checkpoint else "start", start, devices=devices)
        saver = _make_saver(config, root, state.step, bool(checkpoint), metrics)
        desk = RunDesk(
            run,
            engine,
            mixture,
            loader,
            state,
            metrics=metrics,
            saver=saver,
            evaluation=evaluation,
            adapters=adapters,
            monitor=monitor,
            interrupt=interrupt,
            peak=peak,
            log=log,
        )
        started, tokens_before = time.monotonic(), state.task_tokens.sum()
        try:
            train(config, tasks, engine, loader, state, desk, Clock(run.model.value.windows))
            monitor.progress(state.step, "saving")
            saver.wait()
        except BaseException:
            saver.wait(place.timeout)  # a checkpoint that is nearly written is worth a moment
            raise
        monitor.progress(state.step, "ending")
        seconds = time.monotonic() - started
        tokens, stopped = processes.sum([int(state.task_tokens.sum() - tokens_before), interrupt.requested])
        skipped = sum(map(Counter, processes.gather(loader.skipped())), Counter[str]())
        if metrics:
            for reason, count in skipped.items():
                print(f"note: {count // config.tp_size} records were not trained on: {printable(reason)}")
            text = f"stopped by a signal after {seconds:.0f} s" if stopped else f"ended after {seconds:.0f} s"
            metrics.event(state.step, "signal" if stopped else "end", text)
    if state.step == 0 and not stopped:
        raise UserError("nothing was trained on: no record of the mixture gave a sample")
    if saver.failure:
        last = f"{root / str(saver.written)}" if saver.written else "none of this session"
        raise UserError(f"the last checkpoint could not be written (the last good one: {last}): {saver.failure}")
    best = processes.from_first(best_step(root) if first and config.save else None)
    return Result(
        step=state.step,
        tokens=tokens // config.tp_size,
        seconds=seconds,
        metrics_file=log / METRICS_FILE,
        tensorboard=tensorboard,
        checkpoint=root / str(state.step) if config.save and state.step else None,
        best=None if best is None else root / str(best),
        interrupted=bool(stopped),
    )


def _look_around(run: RunConfig, place: Place, root: Path, log: Path) -> tuple[RunConfig, Checkpoint | None, list[str]]:
    """On rank 0, the run with the keys of its adapters, what it goes on from, and what there is to know, a line each.
    Leftovers of killed runs go."""
    require_sinks(run.train.value.sinks)
    for folder in (root, log):
        sweep(folder)
    checkpoint, notes = find_checkpoint(run.train.value, place, root, log)
    run, about_keys = settle_keys(with_paths(run), checkpoint)
    return run, checkpoint, notes + about_keys + (changes(run, checkpoint) if checkpoint else [])


def _first_day(checkpoint: Checkpoint | None) -> str:
    """The day that templates write as today's: the one of the checkpoint, or today."""
    made_with = checkpoint.position().get("fingerprint", {}) if checkpoint else {}
    return made_with.get("template_date") or datetime.date.today().isoformat()


def _make_saver(config: TrainConfig, root: Path, step: int, resumed: bool, metrics: Metrics | None) -> Saver:
    """Writes the run's checkpoints. metrics: on rank 0, which alone knows whether the run was resumed."""
    there = steps_in(root) if metrics and config.save else []
    left = [later for later in there if resumed and later > step]
    if left:
        named = ", ".join(map(str, left))
        print(f"note: checkpoints of later steps ({named}) become STEP.left when this run saves its first")
    return Saver(
        root,
        first=metrics is not None,
        background=config.async_save,
        limit=config.save_total_limit,
        replaced=[] if resumed else there,
        left=left,
        told=metrics.event if metrics else _tell_nobody,
    )


def _tell_nobody(step: int, kind: str, text: str) -> None: ...


def _open_metrics(run: RunConfig, tensorboard: Path, log: Path, step: int) -> Metrics:
    config = run.train.value
    values = {key: item["value"] for key, item in run.to_json()["train"].items()}
    project = config.exp_group or "fm9g"
    sinks = open_sinks(config.sinks, tensorboard, log, project, config.model_unique, values, step)
    return Metrics(log, sinks, step, config.train_iters, config.tensorboard_all_tasks, config.spike)


def _description(run: RunConfig, mixture: Mixture, evaluation: Evaluation | None, summary: str) -> dict[str, Any]:
    """What reports say of a run."""
    shares = [{"share": share, "tokens_a_sample": mean} for share, mean in zip(mixture.shares(), mixture.mean_tokens())]
    return {
        "config": run.to_json(),
        "data": [{**about, **share} for about, share in zip(_datasets(mixture), shares)],
        "validation": _datasets(evaluation.mixture) if evaluation else [],
        "summary": summary,
        "versions": {name: version(name) for name in PACKAGES},
    }


def _datasets(mixture: Mixture) -> list[dict[str, Any]]:
    return [
        {
            "task": config.task_name,
            "path": config.path,
            "records": len(dataset),
            "template": config.template,
            "loss": config.loss,
        }
        for config, dataset in zip(mixture.configs, mixture.datasets)
    ]


def _with_epochs(run: RunConfig, mixture: Mixture, packs: int) -> tuple[RunConfig, list[str]]:
    """The run with the train_iters that its `epochs` take, and a line that says so."""
    config = run.train.value
    if not config.epochs:
        return run, []
    tokens = mixture.count_tokens()
    iters = config.iters_of_epochs(tokens, config.batch_size * config.max_length * packs)
    origins = run.train.origins | {"train_iters": run.train.origins["epochs"]}
    train = Loaded(replace(config, train_iters=iters), origins)
    return replace(run, train=train), [
        f"epochs {config.epochs:g}: train_iters {iters}; an epoch has about {tokens:.0f} tokens"
    ]


def _open_in_turn(run: RunConfig, place: Place, processes: Processes, date: str) -> tuple[Mixture, list[str]]:
    """The data of a run. Where token caches are made, one process of each machine makes them, the first machine's
    first: the folder may be shared.
    """
    turn = 0 if place.rank == 0 else 1 if place.local_rank == 0 else 2
    turns = 3 if run.train.value.token_cache else 1
    for now in range(turns):
        if now == min(turn, turns - 1):
            opened = open_mixture(run, date)
        processes.sum([0])  # wait for the others
    return opened


def _check_same(run: RunConfig, processes: Processes, data: dict[str, Any]) -> None:
    """Raises UserError that names a process whose code, packages, configuration or data are not rank 0's."""
    packages = {name: version(name) for name in PACKAGES}
    mine = {"code": code_identity(), "packages": packages, "config": run.identity(), "data": data}
    check_same(processes.gather(mine), processes.gather(host_name()))


def _summary(run: RunConfig, engine: Engine, mixture: Mixture, packs: int) -> str:
    config, model = run.train.value, run.model.value
    weights = sum(shape.numel() for shape in weight_shapes(model).values())
    data = ", ".join(f"{c.task_name} ({size} records)" for c, size in zip(mixture.configs, map(len, mixture.datasets)))
    dtype = str(compute_dtype(model, engine.device)[0]).removeprefix("torch.")
    count = engine.processes.world_size
    where = f"{engine.device.type}, {count} processes, {engine_name(config)}" if count > 1 else str(engine.device)
    summary = f"{weights:,} parameters, {dtype} on {where}; data: {data}"
    return "\n".join([summary, _tokens_per_step(run, packs), *mixture.describe()])


def _tokens_per_step(run: RunConfig, packs: int) -> str:
    """How many there are and how they come about; where from, for what is not of the command line."""
    config, origins = run.train.value, run.train.origins
    replicas = packs // config.grad_accum
    keys = ["batch_size", "max_length", "global_batch" if config.global_batch else "grad_accum"]
    factors = []
    for key in keys:
        origin = "" if origins[key] == COMMAND_LINE else f" ({origins[key]})"
        factors.append(f"{key} {getattr(config, key)}{origin}")
    if replicas > 1 and not config.global_batch:
        factors.append(f"{replicas} replicas of the model")
    return f"{config.batch_size * config.max_length * packs} tokens per step: {' x '.join(factors)}"


def _check_fit(config: TrainConfig, model: ModelConfig, mixture: Mixture) -> list[str]:
    """Raises UserError where tokenizer and model do not fit; returns what may be meant, a line each."""
    if mixture.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer_path: {config.tokenizer_path} has {mixture.tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {model.vocab_size}; they do not belong together"
        )
    notes = []
    if config.max_length > model.max_length:
        notes.append(f"max_length {config.max_length} is more than the model is made for ({model.max_length})")
    if mixture.tokenizer.vocab_size < _LIKELY_OWN * model.vocab_size and config.pretrained_model:
        notes.append(
            f"tokenizer_path {config.tokenizer_path} has {mixture.tokenizer.vocab_size} of the model's "
            f"{model.vocab_size} token ids; is it the tokenizer of {config.pretrained_model}?"
        )
    return notes
