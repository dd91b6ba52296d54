"""One run from its configuration: puts the rooms together, and nothing else does."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fm9g.checkpoint.folder import MODEL_CONFIG, Checkpoint, Snapshot, Tensors, open_step, save_checkpoint, steps_in
from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.loader import Loader
from fm9g.data.mixture import Mixture
from fm9g.data.position import fingerprint, merge_positions
from fm9g.engine.base import Engine
from fm9g.engine.processes import Processes
from fm9g.errors import UserError
from fm9g.files import probe_writable
from fm9g.launch.agree import check_same, code_identity
from fm9g.launch.monitor import Monitor
from fm9g.launch.place import Place, host_name
from fm9g.model.transformer import weight_shapes
from fm9g.train.build import build_model, compute_dtype, engine_name, make_engine
from fm9g.train.data import open_loader, open_mixture
from fm9g.train.interrupt import Interrupt
from fm9g.train.loop import TrainState, train
from fm9g.train.metrics import METRICS_FILE, Metrics


@dataclass(frozen=True)
class Result:
    """What a run left behind. checkpoint: None where it was told not to save. interrupted: by a signal."""

    step: int
    tokens: int
    seconds: float
    metrics_file: Path
    tensorboard: Path
    checkpoint: Path | None
    interrupted: bool


def run_training(run: RunConfig, place: Place | None = None) -> Result:
    """Trains as configured and returns where everything is. Raises UserError.

    place: of this process among those of the run; None: it is alone. All of them return the same.
    """
    place = place or Place(timeout=run.train.value.timeout, step_timeout=run.train.value.step_timeout)
    log = Path(run.train.value.output_dir) / "logs" / f"{run.train.value.exp_group}{run.train.value.model_unique}"
    with Monitor(place, log) as monitor, _join(run, place, monitor) as processes:
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
    checkpoint = _find_checkpoint(config, place, root) if first else None
    replicas = config.replicas(processes.world_size)
    packs = config.packs_a_step(replicas)

    monitor.progress(0, "reading the data")
    mixture, notes = _open_in_turn(run, place, processes)
    _check_same(run, processes, fingerprint(mixture, packs))
    notes += _check_fit(config, run.model.value, mixture)
    monitor.progress(0, "building the model")
    notes += build_model(engine, config, run.model.value, checkpoint)
    tasks = [item.value.task_name for item in run.mixture]
    state, position = _restore(engine, config, checkpoint, tasks)
    if first:
        for note in notes:
            print(f"note: {note}")
        print(_summary(run, engine, mixture, packs))
        print(f"resuming from {checkpoint.folder}" if checkpoint else "starting at step 0")
    replaced = [] if checkpoint else steps_in(root)
    if config.save and first:
        probe_writable(root)
    if state.step >= min(config.stop_iters or config.train_iters, config.train_iters) and first:
        print(f"note: nothing is left to do: step {state.step}, train_iters {config.train_iters}")
    with (
        open_loader(config, mixture, engine.replica, replicas, position) as loader,
        Metrics(tensorboard, log, state.step, config.train_iters) if first else nullcontext() as metrics,
        Interrupt() as interrupt,
    ):

        def save() -> None:
            if not config.save:
                return
            monitor.progress(state.step, "saving")
            snapshot = take_snapshot(run, engine, loader, mixture, state, tasks)
            if not first:
                for _ in chain(snapshot.weights.values, snapshot.optimizer.values):
                    pass
                return
            save_checkpoint(root, state.step, snapshot)
            while replaced:  # only now that the new run has something to show for itself
                if (old := replaced.pop()) != state.step:
                    shutil.rmtree(root / str(old))

        def should_stop() -> bool:
            monitor.progress(state.step)
            return interrupt.requested

        if first:
            for note in loader.notes:
                print(f"note: {note}")
        started, tokens_before = time.monotonic(), state.task_tokens.sum()
        train(config, tasks, engine, loader, metrics, state, save, should_stop)
        monitor.progress(state.step, "ending")
        seconds = time.monotonic() - started
        tokens, stopped = processes.sum([int(state.task_tokens.sum() - tokens_before), interrupt.requested])
        skipped: Counter[str] = Counter()
        for counts in processes.gather(loader.skipped()):
            skipped.update(counts)
        if first:
            for reason, count in skipped.items():
                print(f"note: {count // config.tp_size} records were not trained on: {reason}")
    if state.step == 0 and not stopped:
        raise UserError("nothing was trained on: no record of the mixture gave a sample")
    return Result(
        step=state.step,
        tokens=tokens // config.tp_size,
        seconds=seconds,
        metrics_file=log / METRICS_FILE,
        tensorboard=tensorboard,
        checkpoint=root / str(state.step) if config.save and state.step else None,
        interrupted=bool(stopped),
    )


def _find_checkpoint(config: TrainConfig, place: Place, root: Path) -> Checkpoint | None:
    """What the run goes on from. Raises UserError where it is not there, or others would be overwritten unasked."""
    steps = steps_in(root)
    restarted = place.attempt and place.started  # by our agent, which tells since when the run goes on
    if restarted:  # only what this run saved itself is newer than its start
        own = [step for step in steps if (root / str(step)).stat().st_mtime >= place.started]
        if own:
            return open_step(root, own[-1])
    if config.resume_ckpt == "latest":
        return open_step(root, steps[-1]) if steps else None
    if config.resume_ckpt:
        return open_step(root, int(config.resume_ckpt))
    if steps and config.save and not config.overwrite and not restarted:
        raise UserError(
            f"{root}: holds checkpoints of steps {', '.join(map(str, steps))}; go on with --resume_ckpt, "
            "choose another --model_unique, or have them deleted with --overwrite true"
        )
    return None


def _open_in_turn(run: RunConfig, place: Place, processes: Processes) -> tuple[Mixture, list[str]]:
    """The data of a run. Where token caches are made, one process of each machine makes them, the first machine's
    first: the folder may be shared.
    """
    turn = 0 if place.rank == 0 else 1 if place.local_rank == 0 else 2
    turns = 3 if run.train.value.token_cache else 1
    for now in range(turns):
        if now == min(turn, turns - 1):
            opened = open_mixture(run)
        processes.sum([0])  # wait for the others
    return opened


def _check_same(run: RunConfig, processes: Processes, data: dict[str, Any]) -> None:
    """Raises UserError that names a process whose code, packages, configuration or data are not rank 0's."""
    packages = {name: version(name) for name in ("torch", "numpy", "tokenizers")}
    mine = {"code": code_identity(), "packages": packages, "config": run.identity(), "data": data}
    check_same(processes.gather(mine), processes.gather(host_name()))


def take_snapshot(
    run: RunConfig, engine: Engine, loader: Loader, mixture: Mixture, state: TrainState, tasks: list[str]
) -> Snapshot:
    """What a checkpoint of this moment holds. All ranks must take part."""
    processes = engine.processes
    tokens = np.array(processes.sum(state.task_tokens.tolist())) // (processes.world_size // engine.replicas)
    return Snapshot(
        weights=Tensors(engine.weights_like(), engine.weights()),
        optimizer=Tensors(engine.optimizer_like(), engine.optimizer_state()),
        position=merge_positions(processes.gather(loader.position())),
        counts={
            "iteration": state.step,
            "global_token_pass": int(np.sum(tokens)),
            "global_total_task_token": dict(zip(tasks, tokens.tolist())),
        },
        documents={MODEL_CONFIG: run.model.value.to_json(), "run_config.json": run.to_json()},
        tokenizer_files=mixture.files_to_keep(),
    )


def _restore(
    engine: Engine, config: TrainConfig, checkpoint: Checkpoint | None, tasks: list[str]
) -> tuple[TrainState, dict[str, Any] | None]:
    """How far the run is, and its data position. checkpoint: on rank 0, which tells the others."""
    found = (checkpoint.counts(), checkpoint.position()) if checkpoint else None
    found = engine.processes.from_first(found)
    if found is None:
        return TrainState(0, np.zeros(len(tasks), np.int64)), None
    counts, position = found
    if not config.resume_no_optimze:
        engine.load_optimizer_state(checkpoint.optimizer() if checkpoint else {})
    trained = counts["global_total_task_token"]
    # Counted once, on the processes that hold rank 0's data.
    tokens = np.array([trained.get(task, 0) if engine.replica == 0 else 0 for task in tasks], np.int64)
    return TrainState(counts["iteration"], tokens), position


def _summary(run: RunConfig, engine: Engine, mixture: Mixture, packs: int) -> str:
    config, model = run.train.value, run.model.value
    weights = sum(shape.numel() for shape in weight_shapes(model).values())
    tokens = config.batch_size * config.max_length * packs
    data = ", ".join(f"{c.task_name} ({size} records)" for c, size in zip(mixture.configs, map(len, mixture.datasets)))
    dtype = str(compute_dtype(model, engine.device)[0]).removeprefix("torch.")
    count = engine.processes.world_size
    where = f"{engine.device.type}, {count} processes, {engine_name(config)}" if count > 1 else str(engine.device)
    return f"{weights:,} parameters, {dtype} on {where}; {tokens} tokens a step; data: {data}"


def _check_fit(config: TrainConfig, model: ModelConfig, mixture: Mixture) -> list[str]:
    """Raises UserError where tokenizer and model do not fit; returns what may be meant, a line each."""
    if mixture.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer_path: {config.tokenizer_path} has {mixture.tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {model.vocab_size}; they do not belong together"
        )
    if config.max_length > model.max_length:
        return [f"max_length {config.max_length} is more than the model is made for ({model.max_length})"]
    return []
