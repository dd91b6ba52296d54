"""What a run goes on from: its own checkpoints, or another's."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.checkpoint.checkpoint import (
    BEST,
    LAST,
    MANIFEST,
    MODEL_CONFIG,
    Checkpoint,
    checkpoint_ids,
    latest_checkpoint,
    list_steps,
    open_checkpoint,
    resolve_step,
)
from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.config.load import read_object
from fm9g.config.model import architecture_of, load_model_config, values_differ
from fm9g.config.run import PATH_KEYS, RunConfig
from fm9g.config.train import ADAPTER_KEYS, TrainConfig
from fm9g.convert.merge import with_adapter
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.launch.dist_env import RankInfo
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.loop import TrainState

_START_FILE = "start.json"  # beside the metrics: see _record_start
_COMPATIBLE_OPTIMIZERS = {"adamw", "adamw8bit"}  # optimizers that go on from one another
_INHERITED_ADAPTER_KEYS = (
    "lora_layer",
    *ADAPTER_KEYS,
)  # keys that a resumed run has from its checkpoint where they are not given
# Those of them that say which weights are trained, and what they mean.
_FIXED_ADAPTER_KEYS = ("lora_layer", "lora_r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights")
# Keys that say how a session starts; that they differ from those of the one before is their nature.
_SESSION_KEYS = (
    *PATH_KEYS,
    "resume_ckpt",
    "resume_no_optimze",
    "overwrite",
    "stop_iters",
    "only_load_model",
    "load_dataloader_ckpt",
    "on_data_change",
)


def resolve_checkpoint_paths(run: RunConfig) -> RunConfig:
    """The run with the paths of checkpoints that pretrained_model and adapter name as RUN/best or RUN/last.

    Raises UserError where a run has no such checkpoint.
    """
    for key in ("pretrained_model", "adapter"):
        given = getattr(run.train.value, key)
        if given and (path := str(resolve_checkpoint_path(Path(given)))) != str(Path(given)):
            run = replace(run, train=run.train.with_values({key: path}, run.train.origins[key]))
    return run


def find_resume_checkpoint(
    config: TrainConfig, rank_info: RankInfo, checkpoint_dir: Path, log_dir: Path
) -> tuple[Checkpoint | None, list[str]]:
    """What the run goes on from, and what there is to know, a line each.

    checkpoint_dir, log_dir: the folders of its checkpoints and of its metrics. Raises UserError where it is not there,
    or others would be overwritten unasked.
    """
    steps, needed = list_steps(checkpoint_dir), not config.resume_no_optimze
    is_restart = rank_info.attempt and rank_info.start_time  # by our agent, which tells one start from another
    if is_restart:  # it goes on from what this run saved itself
        found, notes = latest_checkpoint(
            checkpoint_dir, ignored=_marks_before_start(checkpoint_dir, rank_info, log_dir)
        )
        if found:
            return found, notes
    elif rank_info.start_time and config.save:
        _record_start(checkpoint_dir, rank_info, log_dir)
    if config.resume_ckpt in ("auto", LAST):
        found, notes = latest_checkpoint(checkpoint_dir, needs_optimizer=needed)
        if found is None and config.resume_ckpt == LAST:
            raise UserError(f"{checkpoint_dir}: holds no checkpoint to go on from; --resume auto starts at step 0 then")
        return found, notes
    if config.resume_ckpt == BEST:
        return open_checkpoint(checkpoint_dir, resolve_step(checkpoint_dir, BEST), needed), []
    if config.resume_ckpt:
        return open_checkpoint(checkpoint_dir, int(config.resume_ckpt), needed), []
    if steps and config.save and not config.overwrite and not is_restart:
        raise UserError(
            f"{checkpoint_dir}: holds checkpoints of steps {', '.join(map(str, steps))}; go on with --resume auto, "
            "choose another --model_unique, or have them deleted with --overwrite true"
        )
    return None, []


def _record_start(checkpoint_dir: Path, rank_info: RankInfo, log_dir: Path) -> None:
    """Notes, for restarts, which checkpoints are not of this run."""
    with atomic_file(log_dir / _START_FILE) as temporary:
        temporary.write_text(
            json.dumps({"started": rank_info.start_time, "checkpoints": checkpoint_ids(checkpoint_dir)}),
            encoding="utf-8",
        )


def _marks_before_start(checkpoint_dir: Path, rank_info: RankInfo, log_dir: Path) -> dict[str, Any]:
    """What `checkpoint_ids` gave when this run began; what it gives now where the run never came so far."""
    with suppress(UserError, KeyError):
        start = read_object(log_dir / _START_FILE, is_input=False)
        if start["started"] == rank_info.start_time:
            return start["checkpoints"]
    return checkpoint_ids(checkpoint_dir)


def inherit_keys(run: RunConfig, checkpoint: Checkpoint | None) -> tuple[RunConfig, list[str]]:
    """On rank 0, the run with the keys that come from its checkpoint, or from the adapter that it starts from.

    These are the keys of adapters and where the weights came from, if they are not given. Also returns a line for each
    given key that a resume makes useless. Raises UserError if given keys contradict that adapter or that checkpoint.
    """
    notes = []
    if checkpoint is None:
        run = with_adapter(run)
    else:
        saved = {key: row["value"] for key, row in checkpoint.run_config().get("train", {}).items()}
        train = run.train.value
        if train.adapter and not saved.get("lora_layer"):
            raise UserError(
                f"adapter {train.adapter}: {checkpoint.folder} is of a run that trains all weights; give the new run "
                "another --model_unique"
            )
        keys = [*_INHERITED_ADAPTER_KEYS, "adapter"] if saved.get("lora_layer") else ["pretrained_model"]
        if not saved.get("lora_layer") or train.adapter != saved.get("adapter"):
            given = [key for key in ("pretrained_model", "adapter") if key in keys and getattr(train, key)]
            notes = [f"{key} changes nothing: the run goes on from {checkpoint.folder}" for key in given]
        found = {key: saved[key] for key in keys if key in saved and run.train.origins[key] == "default"}
        run = replace(run, train=run.train.with_values(found, str(checkpoint.folder)))
    if not run.train.value.lora_layer:
        run.train.value.reject_adapter_keys()
    return run, notes


def broadcast_adapter_keys(run: RunConfig, dist_context: DistContext) -> RunConfig:
    """The run with rank 0's keys of adapters."""
    for key, value, origin in dist_context.broadcast_object(
        [row for row in run.train.items() if row[0] in _INHERITED_ADAPTER_KEYS]
    ):
        run = replace(run, train=run.train.with_values({key: value}, origin))
    return run


def config_diff(run: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """What of the configuration is not as it was, a line each. Raises UserError for what cannot change: the model."""
    before = load_model_config(checkpoint.folder / MODEL_CONFIG).value
    old, new = architecture_of(before), architecture_of(run.model.value)
    if mismatches := [f"{key}: was {old[key]!r}, is {new[key]!r}" for key in new if values_differ(old[key], new[key])]:
        raise UserError(
            f"{checkpoint.folder}: was made with another model, which a run cannot change on its way:",
            *mismatches,
            "Resume with what it was, or start a run of its own with --pretrained_model and another --model_unique",
        )
    saved = checkpoint.run_config().get("train", {})
    optimizers = [saved.get("optimizer", {"value": "adamw"})["value"], run.train.value.optimizer]
    if (
        optimizers[0] != optimizers[1]
        and not set(optimizers) <= _COMPATIBLE_OPTIMIZERS
        and not run.train.value.resume_no_optimze
    ):
        raise UserError(
            f"optimizer: was {optimizers[0]}, is {optimizers[1]}, which cannot go on with its state; "
            "--resume_no_optimze true starts with a new one"
        )
    if mismatches := [
        f"{key}: was {saved[key]['value']!r}, is {getattr(run.train.value, key)!r}"
        for key in _FIXED_ADAPTER_KEYS
        if key in saved and _as_set(saved[key]["value"]) != _as_set(getattr(run.train.value, key))
    ]:
        raise UserError(
            f"{checkpoint.folder}: its adapters are others, which a run cannot change on its way:", *mismatches
        )
    model = {key: (before.to_json()[key], run.model.value.to_json()[key]) for key in ("dropout_p", "mup_lr")}
    return [
        *(
            f"{key}: was {saved[key]['value']!r}, is {value!r}"
            for key, value, _ in run.train.items()
            if key in saved and key not in _SESSION_KEYS and values_differ(saved[key]["value"], value)
        ),
        *(f"model.{key}: was {old!r}, is {now!r}" for key, (old, now) in model.items() if old != now),
    ]


def _as_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def restore(
    engine: Engine,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    tasks: list[str],
    adapter_training: AdapterTraining | None,
) -> tuple[TrainState, dict[str, Any] | None]:
    """How far the run is, and its data position. checkpoint: on rank 0, which tells the others. adapter_training: what
    is trained in place of the model."""
    is_rank_zero = engine.dist_context.rank == 0
    pretrained = _pretrained_checkpoint(config) if is_rank_zero and checkpoint is None else None
    source = checkpoint or pretrained
    found = None
    if source:
        with_optimizer = not config.resume_no_optimze if checkpoint else not config.only_load_model
        position = source.loader_state() if checkpoint or config.load_dataloader_ckpt else None
        found = (source.trainer_state() if checkpoint else None, position, with_optimizer, bool(source.ema_weights()))
    found = engine.dist_context.broadcast_object(found)
    if found is None:
        return TrainState(0, np.zeros(len(tasks), np.int64)), None
    counts, position, with_optimizer, has_ema = found
    if with_optimizer:
        engine.load_optimizer_state(source.optimizer() if source else {})
        if has_ema and config.ema_decay:
            ema = source.ema_weights() if source else {}
            engine.load_ema_weights(adapter_training.trained_weights(ema) if adapter_training else ema)
    if counts is None:
        return TrainState(0, np.zeros(len(tasks), np.int64)), position
    trained = counts["global_total_task_token"]
    # Counted once, on the processes that hold rank 0's data.
    tokens = np.array([trained.get(task, 0) if engine.dp_rank == 0 else 0 for task in tasks], np.int64)
    return (
        TrainState(
            counts["iteration"],
            tokens,
            skipped_steps=counts.get("skipped", 0),
            loss=counts.get("loss"),
            best_val_loss=counts.get("best_val_loss"),
            evals_since_best=counts.get("evaluations_since_best", 0),
        ),
        position,
    )


def _pretrained_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that pretrained_model is, or lies in, where more than its weights is wanted of it."""
    if (config.only_load_model and not config.load_dataloader_ckpt) or not config.pretrained_model:
        return None
    path = Path(config.pretrained_model)
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        key = "load_dataloader_ckpt true" if config.only_load_model else "only_load_model false"
        raise UserError(f"{key}: {path} is no checkpoint of a run, and holds weights alone")
    return Checkpoint(folder, needs_optimizer=not config.only_load_model)
