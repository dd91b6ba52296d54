"""Everything a run is made from: training, model and mixture configuration, with the command line on top."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fm9g.config.fields import canonical_keys, canonical_value, keys_of
from fm9g.config.load import Resolved, require_config
from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.train import TrainConfig, load_train_config
from fm9g.errors import UserError

# Keys that hold a path.
PATH_KEYS = (
    "dataset_config",
    "val_dataset",
    "tokenizer_path",
    "pretrained_model",
    "adapter",
    "output_dir",
    "token_cache_dir",
    "chat_template",
    "path",
    "transforms",
)


@dataclass(frozen=True)
class RunConfig:
    """The resolved configuration of a run. notes: what the user should know about it, a line each."""

    train: Resolved[TrainConfig]
    model: Resolved[ModelConfig]
    mixture: list[Resolved[DatasetConfig]]
    validation: list[Resolved[DatasetConfig]]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Every value with its origin, as kept in checkpoints."""
        return {
            name: {key: {"value": value, "from": origin} for key, value, origin in resolved.items()}
            for name, resolved in self._sections().items()
        }

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same on all machines: every value but places of files, which may be mounted elsewhere."""
        return {
            name: {key: value for key, value, _ in resolved.items() if key not in PATH_KEYS}
            for name, resolved in self._sections().items()
        }

    def _sections(self) -> dict[str, Resolved[Any]]:
        sections: dict[str, Resolved[Any]] = {"train": self.train, "model": self.model}
        sections |= {f"data.{item.value.task_name}": item for item in self.mixture}
        return sections | {f"val.{item.value.task_name}": item for item in self.validation}


def with_current_keys(config: dict[str, Any]) -> dict[str, Any]:
    """RunConfig.to_json as an earlier version may have written it, by the names that keys and values have now."""
    classes: dict[str, type] = {"train": TrainConfig, "model": ModelConfig}
    return {
        section: _with_current_keys(classes.get(section, DatasetConfig), items) if isinstance(items, dict) else items
        for section, items in config.items()
    }


def _with_current_keys(cls: type, items: dict[str, Any]) -> dict[str, Any]:
    fields, renamed = keys_of(cls), {}
    for key, item in canonical_keys(cls, items, "run_config.json").items():
        if key in fields and isinstance(item, dict) and "value" in item:
            item = {**item, "value": canonical_value(fields[key], item["value"])}
        renamed[key] = item
    return renamed


def with_defaults(item: Resolved[DatasetConfig], train: Resolved[TrainConfig]) -> Resolved[DatasetConfig]:
    """A dataset with the run's chat_template, train_on, turns and max_samples where it has none; and stop_when_end."""
    keys = [key for key in ("chat_template", "train_on", "turns", "max_samples") if not getattr(item.value, key)]
    values = {key: getattr(train.value, key) for key in keys}
    origins = {key: train.origins[key] for key in keys}
    if train.value.stop_when_end:
        values["allow_repeat"], origins["allow_repeat"] = False, train.origins["stop_when_end"]
    return Resolved(replace(item.value, **values), item.origins | origins)


def load_run(name: str, overrides: dict[str, str], complete: bool = True) -> RunConfig:
    """The configuration that `fm9g train --config NAME --key value ...` names.

    overrides: KEY, default.KEY, model.KEY or data.TASK.KEY -> text. complete: what a run cannot do without must be
    there; else it is a note. Raises UserError.
    """
    train_overrides: dict[str, str] = {}
    model_overrides: dict[str, str] = {}
    data_overrides: dict[str, dict[str, str]] = {}
    default_overrides: dict[str, str] = {}
    for key, value in overrides.items():
        section, _, rest = key.partition(".")
        if section == "model" and rest:
            model_overrides[rest] = value
        elif section == "default" and rest:
            default_overrides[rest] = value
        elif section == "data" and "." in rest:
            task, _, task_key = rest.rpartition(".")
            data_overrides.setdefault(task, {})[task_key] = value
        else:
            train_overrides[key] = value
    train, model_file = load_train_config(name, train_overrides, default_overrides)
    model = load_model_config(model_file, model_overrides)
    train = _with_model_checkpointing(train, model)
    missing = [
        f"{key}: missing; give --{key}, or set it in a file of train_configs/"
        for key in ("dataset_config", "tokenizer_path")
        if not getattr(train.value, key)
    ]
    if missing and complete:
        raise UserError(*missing)
    notes = [*train.notes, *model.notes, *missing]

    def datasets(name: str, overrides: dict[str, dict[str, str]]) -> list[Resolved[DatasetConfig]]:
        found = load_mixture(require_config("dataset_configs", name), overrides) if name else []
        return [with_defaults(item, train) for item in found]

    mixture, validation = datasets(train.value.dataset_config, data_overrides), datasets(train.value.val_dataset, {})
    return RunConfig(train, model, mixture, validation, notes)


def _with_model_checkpointing(train: Resolved[TrainConfig], model: Resolved[ModelConfig]) -> Resolved[TrainConfig]:
    """The training configuration with the model's use_checkpoint, where it says nothing of its own."""
    given = [key for key in ("use_checkpoint", "activation_checkpoint") if train.origins[key] != "default"]
    if given or not model.value.use_checkpoint:
        return train
    origins = train.origins | {"use_checkpoint": model.origins["use_checkpoint"]}
    return Resolved(replace(train.value, use_checkpoint=True), origins, train.notes)
