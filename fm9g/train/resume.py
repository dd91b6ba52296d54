"""What a run goes on from: its own checkpoints, or another's."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fm9g.checkpoint.find import named
from fm9g.checkpoint.folder import (
    BEST,
    LAST,
    MANIFEST,
    MODEL_CONFIG,
    Checkpoint,
    marks_in,
    named_step,
    open_newest,
    open_step,
    steps_in,
)
from fm9g.config.load import read_object
from fm9g.config.model import arithmetic, differ, load_model_config
from fm9g.config.run import PLACES, RunConfig
from fm9g.config.train import ADAPTER_KEYS, TrainConfig
from fm9g.convert.adapters import with_adapter
from fm9g.engine.base import Engine
from fm9g.engine.processes import Processes
from fm9g.errors import UserError
from fm9g.files import new_file
from fm9g.launch.place import Place
from fm9g.train.adapters import Adapters
from fm9g.train.loop import TrainState

_START = "start.json"  # beside the figures: see _note_start
_SAME_STATE = {"adamw", "adamw8bit"}  # optimizers that go on from one another
_ADAPTERS = ("lora_layer", *ADAPTER_KEYS)  # keys that a resumed run has from its checkpoint where they are not given
# Those of them that say which weights are trained, and what they mean.
_OF_ADAPTERS = ("lora_layer", "lora_r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights")
# Keys that say how a session starts; that they differ from those of the one before is their nature.
_OF_A_SESSION = (
    *PLACES,
    "resume_ckpt",
    "resume_no_optimze",
    "overwrite",
    "stop_iters",
    "only_load_model",
    "load_dataloader_ckpt",
    "data_changes",
)


def with_paths(run: RunConfig) -> RunConfig:
    """The run with the paths of checkpoints that pretrained_model and adapter name as RUN/best or RUN/last.

    Raises UserError where a run has no such checkpoint.
    """
    for key in ("pretrained_model", "adapter"):
        given = getattr(run.train.value, key)
        if given and (path := str(named(Path(given)))) != str(Path(given)):
            run = replace(run, train=run.train.changed({key: path}, run.train.origins[key]))
    return run


def find_checkpoint(config: TrainConfig, place: Place, root: Path, log: Path) -> tuple[Checkpoint | None, list[str]]:
    """What the run goes on from, and what there is to know, a line each.

    root, log: the folders of its checkpoints and of its figures. Raises UserError where it is not there, or others
    would be overwritten unasked.
    """
    steps, needed = steps_in(root), not config.resume_no_optimze
    restarted = place.attempt and place.started  # by our agent, which tells one start from another
    if restarted:  # it goes on from what this run saved itself
        found, notes = open_newest(root, others=_there_before(root, place, log))
        if found:
            return found, notes
    elif place.started and config.save:
        _note_start(root, place, log)
    if config.resume_ckpt in ("auto", LAST):
        found, notes = open_newest(root, needs_optimizer=needed)
        if found is None and config.resume_ckpt == LAST:
            raise UserError(f"{root}: holds no checkpoint to go on from; --resume auto starts at step 0 then")
        return found, notes
    if config.resume_ckpt == BEST:
        return open_step(root, named_step(root, BEST), needed), []
    if config.resume_ckpt:
        return open_step(root, int(config.resume_ckpt), needed), []
    if steps and config.save and not config.overwrite and not restarted:
        raise UserError(
            f"{root}: holds checkpoints of steps {', '.join(map(str, steps))}; go on with --resume auto, "
            "choose another --model_unique, or have them deleted with --overwrite true"
        )
    return None, []


def _note_start(root: Path, place: Place, log: Path) -> None:
    """Notes, for restarts, which checkpoints are not of this run."""
    with new_file(log / _START) as temporary:
        temporary.write_text(json.dumps({"started": place.started, "checkpoints": marks_in(root)}), encoding="utf-8")


def _there_before(root: Path, place: Place, log: Path) -> dict[str, Any]:
    """What `marks_in` gave when this run began; what it gives now where the run never came so far."""
    with suppress(UserError, KeyError):
        start = read_object(log / _START, is_input=False)
        if start["started"] == place.started:
            return start["checkpoints"]
    return marks_in(root)


def settle_keys(run: RunConfig, checkpoint: Checkpoint | None) -> tuple[RunConfig, list[str]]:
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
        keys = [*_ADAPTERS, "adapter"] if saved.get("lora_layer") else ["pretrained_model"]
        if not saved.get("lora_layer") or train.adapter != saved.get("adapter"):
            given = [key for key in ("pretrained_model", "adapter") if key in keys and getattr(train, key)]
            notes = [f"{key} changes nothing: the run goes on from {checkpoint.folder}" for key in given]
        found = {key: saved[key] for key in keys if key in saved and run.train.origins[key] == "default"}
        run = replace(run, train=run.train.changed(found, str(checkpoint.folder)))
    if not run.train.value.lora_layer:
        run.train.value.refuse_adapter_keys()
    return run, notes


def share_keys(run: RunConfig, processes: Processes) -> RunConfig:
    """The run with rank 0's keys of adapters."""
    for key, value, origin in processes.from_first([row for row in run.train.rows() if row[0] in _ADAPTERS]):
        run = replace(run, train=run.train.changed({key: value}, origin))
    return run


def changes(run: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """What of the configuration is not as it was, a line each. Raises UserError for what cannot change: the model."""
    before = load_model_config(checkpoint.folder / MODEL_CONFIG).value
    old, new = arithmetic(before), arithmetic(run.model.value)
    if odd := [f"{key}: was {old[key]!r}, is {new[key]!r}" for key in new if differ(old[key], new[key])]:
        raise UserError(
            f"{checkpoint.folder}: was made with another model, which a run cannot change on its way:",
            *odd,
            "Resume with what it was, or start a run of its own with --pretrained_model and another --model_unique",
        )
    saved = checkpoint.run_config().get("train", {})
    rules = [saved.get("optimizer", {"value": "adamw"})["value"], run.train.value.optimizer]
    if rules[0] != rules[1] and not set(rules) <= _SAME_STATE and not run.train.value.resume_no_optimze:
        raise UserError(
            f"optimizer: was {rules[0]}, is {rules[1]}, which cannot go on with its state; --resume_no_optimze true "
            "starts with a new one"
        )
    if odd := [
        f"{key}: was {saved[key]['value']!r}, is {getattr(run.train.value, key)!r}"
        for key in _OF_ADAPTERS
        if key in saved and _as_set(saved[key]["value"]) != _as_set(getattr(run.train.value, key))
    ]:
        raise UserError(f"{checkpoint.folder}: its adapters are others, which a run cannot change on its way:", *odd)
    model = {key: (before.to_json()[key], run.model.value.to_json()[key]) for key in ("dropout_p", "mup_lr")}
    return [
        *(
            f"{key}: was {saved[key]['value']!r}, is {value!r}"
            for key, value, _ in run.train.rows()
            if key in saved and key not in _OF_A_SESSION and differ(saved[key]["value"], value)
        ),
        *(f"model.{key}: was {old!r}, is {now!r}" for key, (old, now) in model.items() if old != now),
    ]


def _as_set(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def restore(
    engine: Engine, config: TrainConfig, checkpoint: Checkpoint | None, tasks: list[str], adapters: Adapters | None
) -> tuple[TrainState, dict[str, Any] | None]:
    """How far the run is, and its data position. checkpoint: on rank 0, which tells the others. adapters: what is
    trained in place of the model."""
    first = engine.processes.rank == 0
    given = _given(config) if first and checkpoint is None else None
    source = checkpoint or given
    found = None
    if source:
        with_optimizer = not config.resume_no_optimze if checkpoint else not config.only_load_model
        position = source.position() if checkpoint or config.load_dataloader_ckpt else None
        found = (source.counts() if checkpoint else None, position, with_optimizer, bool(source.mean_weights()))
    found = engine.processes.from_first(found)
    if found is None:
        return TrainState(0, np.zeros(len(tasks), np.int64)), None
    counts, position, with_optimizer, has_means = found
    if with_optimizer:
        engine.load_optimizer_state(source.optimizer() if source else {})
        if has_means and config.ema_decay:
            means = source.mean_weights() if source else {}
            engine.load_mean_weights(adapters.from_file(means) if adapters else means)
    if counts is None:
        return TrainState(0, np.zeros(len(tasks), np.int64)), position
    trained = counts["global_total_task_token"]
    # Counted once, on the processes that hold rank 0's data.
    tokens = np.array([trained.get(task, 0) if engine.replica == 0 else 0 for task in tasks], np.int64)
    return (
        TrainState(
            counts["iteration"],
            tokens,
            skipped=counts.get("skipped", 0),
            loss=counts.get("loss"),
            best=counts.get("best_val_loss"),
            worse=counts.get("evaluations_since_best", 0),
        ),
        position,
    )


def _given(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that pretrained_model is, or lies in, where more than its weights is wanted of it."""
    if (config.only_load_model and not config.load_dataloader_ckpt) or not config.pretrained_model:
        return None
    path = Path(config.pretrained_model)
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        key = "load_dataloader_ckpt true" if config.only_load_model else "only_load_model false"
        raise UserError(f"{key}: {path} is no checkpoint of a run, and holds weights alone")
    return Checkpoint(folder, needs_optimizer=not config.only_load_model)
