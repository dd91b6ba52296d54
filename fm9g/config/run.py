"""Everything a run is made from: training, model and mixture configuration, with the command line on top."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fm9g.config.load import Loaded, require_config
from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.train import TrainConfig, load_train_config
from fm9g.errors import UserError

# Keys that hold a path.
PLACES = (
    "dataset_config",
    "val_dataset",
    "tokenizer_path",
    "pretrained_model",
    "adapter",
    "output_dir",
    "token_cache",
    "template",
    "path",
    "transforms",
)


@dataclass(frozen=True)
class RunConfig:
    """The resolved configuration of a run. notes: what the user should know about it, a line each."""

    train: Loaded[TrainConfig]
    model: Loaded[ModelConfig]
    mixture: list[Loaded[DatasetConfig]]
    validation: list[Loaded[DatasetConfig]]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Every value with its origin, as kept in checkpoints."""
        return {
            name: {key: {"value": value, "from": origin} for key, value, origin in loaded.rows()}
            for name, loaded in self._sections().items()
        }

    def identity(self) -> dict[str, Any]:
        """What must be the same on all machines: every value but places of files, which may be mounted elsewhere."""
        return {
            name: {key: value for key, value, _ in loaded.rows() if key not in PLACES}
            for name, loaded in self._sections().items()
        }

    def _sections(self) -> dict[str, Loaded[Any]]:
        sections: dict[str, Loaded[Any]] = {"train": self.train, "model": self.model}
        sections |= {f"data.{item.value.task_name}": item for item in self.mixture}
        return sections | {f"val.{item.value.task_name}": item for item in self.validation}


def with_defaults(item: Loaded[DatasetConfig], train: Loaded[TrainConfig]) -> Loaded[DatasetConfig]:
    """A dataset with the run's template, loss, turns and max_samples where it has none, and its stop_when_end."""
    keys = [key for key in ("template", "loss", "turns", "max_samples") if not getattr(item.value, key)]
    values = {key: getattr(train.value, key) for key in keys}
    origins = {key: train.origins[key] for key in keys}
    if train.value.stop_when_end:
        values["allow_repeat"], origins["allow_repeat"] = False, train.origins["stop_when_end"]
    return Loaded(replace(item.value, **values), item.origins | origins)


def load_run(name: str, overrides: dict[str, str], complete: bool = True) -> RunConfig:
    """The configuration that `fm9g train --config NAME --key value ...` names.

    overrides: KEY, default.KEY, model.KEY or data.TASK.KEY -> text. complete: what a run cannot do without must be
    there; else it is a note. Raises UserError.
    """
    plain: dict[str, str] = {}
    model: dict[str, str] = {}
    data: dict[str, dict[str, str]] = {}
    defaults: dict[str, str] = {}
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if section == "model" and rest:
            model[rest] = value
        elif section == "default" and rest:
            defaults[rest] = value
        elif section == "data" and "." in rest:
            task, _, name_in_task = rest.rpartition(".")
            data.setdefault(task, {})[name_in_task] = value
        else:
            plain[key] = value
    train, model_file = load_train_config(name, plain, defaults)
    loaded_model = load_model_config(model_file, model)
    train = _with_checkpointing(train, loaded_model)
    missing = [
        f"{key}: missing; give --{key}, or set it in a file of train_configs/"
        for key in ("dataset_config", "tokenizer_path")
        if not getattr(train.value, key)
    ]
    if missing and complete:
        raise UserError(*missing)
    notes = [*train.notes, *loaded_model.notes, *missing]

    def datasets(name: str, overrides: dict[str, dict[str, str]]) -> list[Loaded[DatasetConfig]]:
        found = load_mixture(require_config("dataset_configs", name), overrides) if name else []
        return [with_defaults(item, train) for item in found]

    mixture, validation = datasets(train.value.dataset_config, data), datasets(train.value.val_dataset, {})
    return RunConfig(train, loaded_model, mixture, validation, notes)


def _with_checkpointing(train: Loaded[TrainConfig], model: Loaded[ModelConfig]) -> Loaded[TrainConfig]:
    """The training configuration with the model's use_checkpoint, where it says nothing of its own."""
    given = [key for key in ("use_checkpoint", "activation_checkpoint") if train.origins[key] != "default"]
    if given or not model.value.use_checkpoint:
        return train
    origins = train.origins | {"use_checkpoint": model.origins["use_checkpoint"]}
    return Loaded(replace(train.value, use_checkpoint=True), origins, train.notes)
