"""Resumes a run from its own checkpoint, or starts it from another one."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.checkpoint.layout import BEST, LAST, MANIFEST, MODEL_CONFIG
from fm9g.checkpoint.steps import checkpoint_ids, latest_checkpoint, list_steps, open_checkpoint, resolve_step
from fm9g.config.fields import default_value, keys_of
from fm9g.config.model import ModelConfig, architecture_of, load_model_config, values_differ
from fm9g.config.run import PATH_KEYS, RunConfig
from fm9g.config.train import TrainConfig
from fm9g.config.train_rules import ADAPTER_KEYS, reject_adapter_keys
from fm9g.convert.run_adapter import with_adapter
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.io.json_file import read_object
from fm9g.launch.dist_env import RankInfo
from fm9g.run_files import START_FILE, RunFolders
from fm9g.train.adapter_training import AdapterTraining
from fm9g.train.new_tokens import complete_modules_to_save, inherit_new_tokens
from fm9g.train.state import TrainState

logger = logging.getLogger(__name__)

_COMPATIBLE_OPTIMIZERS = {"adamw", "adamw8bit"}  # each can use the saved state of the other
_INHERITED_ADAPTER_KEYS = ("lora_layer", *ADAPTER_KEYS)  # keys that a resumed run takes from its checkpoint by default
# Those that decide which weights are trained and what they mean; they cannot change.
_FIXED_ADAPTER_KEYS = (
    "lora_layer",
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "modules_to_save",
)
# Keys about one start of a run; they usually differ from the start before.
_KEYS_OF_ONE_START = (
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
    """Replaces RUN/best and RUN/last in pretrained_model and adapter by the paths of these checkpoints.

    Raises:
        UserError: the run has no such checkpoint.
    """
    for key in ("pretrained_model", "adapter"):
        given = getattr(run.train, key)
        if given and (path := str(resolve_checkpoint_path(Path(given)))) != str(Path(given)):
            run = run.changed("train", {key: path}, run.origins["train"][key])
    return run


def find_resume_checkpoint(config: TrainConfig, rank_info: RankInfo, folders: RunFolders) -> Checkpoint | None:
    """The checkpoint that the run resumes from; None: it starts at step 0.

    Raises:
        UserError: the requested checkpoint does not exist, or existing ones would be overwritten without --overwrite.
    """
    checkpoint_dir, log_dir = folders.checkpoints, folders.logs
    steps, needs_optimizer = list_steps(checkpoint_dir), not config.resume_no_optimze
    is_restart = rank_info.attempt and rank_info.start_time  # by our agent, which tells one start from another
    if is_restart:  # resume from what this run saved itself
        before = _checkpoints_before_start(checkpoint_dir, rank_info, log_dir)
        if checkpoint := latest_checkpoint(checkpoint_dir, ignored=before):
            return checkpoint
    elif rank_info.start_time and config.save:
        _record_start(checkpoint_dir, rank_info, log_dir)
    if config.resume_ckpt in ("auto", LAST):
        checkpoint = latest_checkpoint(checkpoint_dir, needs_optimizer=needs_optimizer)
        if checkpoint is None and config.resume_ckpt == LAST:
            raise UserError(f"{checkpoint_dir}: has no checkpoint to resume from; --resume auto would start at step 0")
        return checkpoint
    if config.resume_ckpt:
        step = resolve_step(checkpoint_dir, BEST) if config.resume_ckpt == BEST else int(config.resume_ckpt)
        return open_checkpoint(checkpoint_dir, step, needs_optimizer)
    if steps and config.save and not config.overwrite and not is_restart:
        raise UserError(
            f"{checkpoint_dir}: has checkpoints of steps {', '.join(map(str, steps))}; resume with --resume auto, "
            "choose another --model_unique, or delete them with --overwrite true"
        )
    return None


def _record_start(checkpoint_dir: Path, rank_info: RankInfo, log_dir: Path) -> None:
    """Writes down, for restarts, which checkpoints existed before this run."""
    content = {"started": rank_info.start_time, "checkpoints": checkpoint_ids(checkpoint_dir)}
    with atomic_file(log_dir / START_FILE) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _checkpoints_before_start(checkpoint_dir: Path, rank_info: RankInfo, log_dir: Path) -> dict[str, Any]:
    """The result of `checkpoint_ids` when this run started; the present one if the run did not get that far."""
    with suppress(UserError, KeyError):
        start = read_object(log_dir / START_FILE, is_input=False)
        if start["started"] == rank_info.start_time:
            return dict(start["checkpoints"])
    return checkpoint_ids(checkpoint_dir)


def inherit_keys(run: RunConfig, checkpoint: Checkpoint | None) -> RunConfig:
    """On rank 0: the run with the keys that come from its checkpoint, or from the adapter that it starts from.

    These are the keys of adapters, the new tokens and the origin of the weights, unless they are given. Warns about
    given keys that have no effect in a resumed run.

    Raises:
        UserError: given keys contradict the adapter or the checkpoint.
    """
    if checkpoint is None:
        run = with_adapter(run)
    else:
        run = inherit_new_tokens(_inherit_from_checkpoint(run, checkpoint), checkpoint)
    if not run.train.lora_layer:
        reject_adapter_keys(run.train)
    return complete_modules_to_save(run)


def _inherit_from_checkpoint(run: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    saved = {key: row["value"] for key, row in checkpoint.run_config().get("train", {}).items()}
    train = run.train
    if train.adapter and not saved.get("lora_layer"):
        raise UserError(
            f"adapter {train.adapter}: {checkpoint.folder} is of a run that trains all weights; give the new run "
            "another --model_unique"
        )
    keys = [*_INHERITED_ADAPTER_KEYS, "adapter"] if saved.get("lora_layer") else ["pretrained_model"]
    if not saved.get("lora_layer") or train.adapter != saved.get("adapter"):
        for key in ("pretrained_model", "adapter"):
            if key in keys and getattr(train, key) and not train.model:  # the user did not write what model implies
                logger.warning(f"{key} has no effect: the run resumes from {checkpoint.folder}")
    inherited = {key: saved[key] for key in keys if key in saved and run.origins["train"][key] == "default"}
    return run.changed("train", inherited, str(checkpoint.folder))


def broadcast_inherited_keys(run: RunConfig, dist_context: DistContext) -> RunConfig:
    """The run with the keys that rank 0 inherited."""
    for section, keys in (("train", (*_INHERITED_ADAPTER_KEYS, "new_tokens")), ("model", ("vocab_size",))):
        rows = [row for row in run.rows(section) if row[0] in keys]
        for key, value, origin in dist_context.broadcast_object(rows):
            run = run.changed(section, {key: value}, origin)
    return run


def check_config_diff(run: RunConfig, checkpoint: Checkpoint) -> None:
    """Logs how the configuration differs from that of the checkpoint.

    Raises:
        UserError: the model, the optimizer or the adapters differ in a way that a run cannot change.
    """
    saved_model = load_model_config(checkpoint.folder / MODEL_CONFIG)
    saved = {key: row["value"] for key, row in checkpoint.run_config().get("train", {}).items()}
    _check_same_model(saved_model, run.model, checkpoint)
    _check_optimizer(saved.get("optimizer", "adamw"), run.train)
    _check_same_adapters(saved, run.train, checkpoint)
    for key, value, _ in run.rows("train"):
        if key in saved and key not in _KEYS_OF_ONE_START and values_differ(saved[key], value):
            logger.info(f"{key}: was {saved[key]!r}, is {value!r}")
    for key in ("dropout_p", "mup_lr"):
        old, new = saved_model.to_json()[key], run.model.to_json()[key]
        if old != new:
            logger.info(f"model.{key}: was {old!r}, is {new!r}")


def _check_same_model(saved: ModelConfig, model: ModelConfig, checkpoint: Checkpoint) -> None:
    old, new = architecture_of(saved), architecture_of(model)
    if mismatches := [f"{key}: was {old[key]!r}, is {new[key]!r}" for key in new if values_differ(old[key], new[key])]:
        raise UserError(
            f"{checkpoint.folder}: is of another model, and a run cannot change its model:",
            *mismatches,
            "Resume with the former values, or start another run with --pretrained_model and another --model_unique",
        )


def _check_optimizer(saved: str, train: TrainConfig) -> None:
    optimizers = {saved, train.optimizer}
    if len(optimizers) > 1 and not optimizers <= _COMPATIBLE_OPTIMIZERS and not train.resume_no_optimze:
        raise UserError(
            f"optimizer: was {saved}, is {train.optimizer}, which cannot use the saved state; "
            "--resume_no_optimze true starts with an empty one"
        )


def _check_same_adapters(saved: dict[str, Any], train: TrainConfig, checkpoint: Checkpoint) -> None:
    defaults = {key: default_value(field) for key, field in keys_of(TrainConfig).items()}
    if mismatches := [
        f"{key}: was {saved.get(key, defaults[key])!r}, is {getattr(train, key)!r}"
        for key in _FIXED_ADAPTER_KEYS
        if _as_set(saved.get(key, defaults[key])) != _as_set(getattr(train, key))
    ]:
        raise UserError(f"{checkpoint.folder}: has other adapters, and a run cannot change its adapters:", *mismatches)


def _as_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def restore(
    engine: Engine,
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    tasks: list[str],
    adapter_training: AdapterTraining | None,
) -> tuple[TrainState, dict[str, Any] | None]:
    """Loads the optimizer's state into the engine, and returns the progress and the data position of the run.

    Args:
        checkpoint: what the run resumes from; on rank 0, which broadcasts the rest.
        tasks: names of the datasets.
        adapter_training: what is trained instead of the model.
    """
    source, saved = checkpoint, None
    if engine.dist_context.rank == 0:
        source = checkpoint or _pretrained_checkpoint(config)
        saved = _saved_state(config, source, is_resume=checkpoint is not None) if source else None
    saved = engine.dist_context.broadcast_object(saved)
    if saved is None:
        return TrainState(0, np.zeros(len(tasks), np.int64)), None
    if saved.with_optimizer:
        engine.load_optimizer_state(source.optimizer() if source else {})
        if saved.has_ema and config.ema_decay:
            ema = source.ema_weights() if source else {}
            engine.load_ema_weights(adapter_training.trained_weights(ema) if adapter_training else ema)
    return _train_state(saved.trainer_state, tasks, counts_tokens=engine.dp_rank == 0), saved.loader_state


@dataclass(frozen=True)
class _SavedState:
    """What all ranks need to know of a checkpoint. trainer_state: None: start at step 0."""

    trainer_state: dict[str, Any] | None
    loader_state: dict[str, Any] | None
    with_optimizer: bool
    has_ema: bool


def _saved_state(config: TrainConfig, source: Checkpoint, is_resume: bool) -> _SavedState:
    """is_resume: source is a checkpoint of this run, not the pretrained_model."""
    return _SavedState(
        trainer_state=source.trainer_state() if is_resume else None,
        loader_state=source.loader_state() if is_resume or config.load_dataloader_ckpt else None,
        with_optimizer=not (config.resume_no_optimze if is_resume else config.only_load_model),
        has_ema=bool(source.ema_weights()),
    )


def _train_state(saved: dict[str, Any] | None, tasks: list[str], counts_tokens: bool) -> TrainState:
    """counts_tokens: this rank has the tokens before the resume, which are counted once: on the replica of rank 0."""
    if saved is None:
        return TrainState(0, np.zeros(len(tasks), np.int64))
    trained = saved["global_total_task_token"] if counts_tokens else {}
    return TrainState(
        saved["iteration"],
        np.array([trained.get(task, 0) for task in tasks], np.int64),
        skipped_steps=saved.get("skipped", 0),
        loss=saved.get("loss"),
        best_val_loss=saved.get("best_val_loss"),
        evals_since_best=saved.get("evaluations_since_best", 0),
    )


def _pretrained_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint given as pretrained_model, or around it, if more than its weights is needed."""
    if (config.only_load_model and not config.load_dataloader_ckpt) or not config.pretrained_model:
        return None
    path = Path(config.pretrained_model)
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        key = "load_dataloader_ckpt true" if config.only_load_model else "only_load_model false"
        raise UserError(f"{key}: {path} is not a checkpoint of a run, and has weights alone")
    return Checkpoint(folder, needs_optimizer=not config.only_load_model)
