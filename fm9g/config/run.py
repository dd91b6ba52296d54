"""The configuration of a run: training, model and datasets, overridden by the command line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fm9g.config.fields import canonical_keys, canonical_value, keys_of
from fm9g.config.load import COMMAND_LINE, ConfigSource, Resolved, require_config
from fm9g.config.mixture import DatasetConfig, resolve_mixture
from fm9g.config.model import ModelConfig, resolve_model_config
from fm9g.config.train import TrainConfig
from fm9g.config.train_file import LAUNCH_SCRIPT, load_train_config
from fm9g.errors import UserError

logger = logging.getLogger(__name__)

# Keys whose value is a path.
PATH_KEYS = (
    "model",
    "data",
    "val_data",
    "data_cache_dir",
    "dataset_config",
    "val_dataset",
    "tokenizer_path",
    "pretrained_model",
    "adapter",
    "output_dir",
    "token_cache_dir",
    "chat_template",
    "new_tokens",
    "path",
    "transforms",
)
_OR_IN_FILE = dict.fromkeys(("dataset_config", "tokenizer_path"), ", or set it in a file of train_configs/")


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run.

    Args:
        mixture: the datasets to train on, in the order of the file.
        validation: the datasets to evaluate on; empty: no evaluation.
        origins: section -> key -> the file or command line that set the value. Sections are "train", "model",
            "data.TASK" and "val.TASK"; keys are spelled as in files.
    """

    train: TrainConfig
    model: ModelConfig
    mixture: list[DatasetConfig]
    validation: list[DatasetConfig]
    origins: dict[str, dict[str, str]]

    def rows(self, section: str) -> list[tuple[str, Any, str]]:
        """Key, value and origin of every key of a section."""
        config = self._sections()[section]
        return [
            (key, getattr(config, field.name), self.origins[section][key]) for key, field in keys_of(config).items()
        ]

    def changed(self, section: str, values: dict[str, Any], origin: str) -> RunConfig:
        """Returns a copy in which some keys of "train" or "model" have other values, all from one origin.

        Raises:
            UserError: the new values do not go together with the others.
        """
        config = self._sections()[section]
        names = {key: field.name for key, field in keys_of(config).items()}
        origins = self.origins | {section: self.origins[section] | dict.fromkeys(values, origin)}
        config = replace(config, **{names[key]: value for key, value in values.items()})
        return replace(self, origins=origins, **{section: config})

    def to_json(self) -> dict[str, Any]:
        """Every value with its origin, as checkpoints store it."""
        return {
            section: {key: {"value": value, "from": origin} for key, value, origin in self.rows(section)}
            for section in self._sections()
        }

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal on all machines: every value except paths, which may differ between machines."""
        return {
            section: {key: value for key, value, _ in self.rows(section) if key not in PATH_KEYS}
            for section in self._sections()
        }

    def _sections(self) -> dict[str, Any]:
        sections: dict[str, Any] = {"train": self.train, "model": self.model}
        sections |= {f"data.{dataset.task_name}": dataset for dataset in self.mixture}
        return sections | {f"val.{dataset.task_name}": dataset for dataset in self.validation}


def section_class(section: str) -> type[TrainConfig] | type[ModelConfig] | type[DatasetConfig]:
    """The configuration class of a section of RunConfig.to_json."""
    if section == "train":
        return TrainConfig
    return ModelConfig if section == "model" else DatasetConfig


def with_current_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Replaces former names of keys and values in a RunConfig.to_json that an earlier version may have written."""
    return {
        section: _with_current_keys(section_class(section), items) if isinstance(items, dict) else items
        for section, items in config.items()
    }


def _with_current_keys(cls: type, items: dict[str, Any]) -> dict[str, Any]:
    fields, renamed = keys_of(cls), {}
    for key, item in canonical_keys(cls, items, "run_config.json").items():
        if key in fields and isinstance(item, dict) and "value" in item:
            item = {**item, "value": canonical_value(fields[key], item["value"])}
        renamed[key] = item
    return renamed


def with_defaults(dataset: DatasetConfig, train: TrainConfig) -> DatasetConfig:
    """Returns the dataset with the run's values for the keys that it leaves open."""
    return replace(dataset, **{key: value for key, (value, _) in _inherited(dataset, train).items()})


def _inherited(dataset: DatasetConfig, train: TrainConfig) -> dict[str, tuple[Any, str]]:
    """Key of the dataset -> the value it takes over from the run, and the training key that sets the value."""
    open_keys = [
        key
        for key in ("chat_template", "train_on", "turns", "max_samples", "oversize_rule", "system")
        if not getattr(dataset, key)
    ]
    values = {key: (getattr(train, key), key) for key in open_keys}
    return values | ({"allow_repeat": (False, "stop_when_end")} if train.stop_when_end else {})


@dataclass(frozen=True)
class RunSources:
    """What files and the command line say of a run, by the part of it that they are about.

    Args:
        train: training keys, from the lowest precedence to the highest.
        model: `model.KEY`, likewise.
        script: `default.KEY`.
        datasets: `data.TASK.KEY`: task -> key -> value.
    """

    train: list[ConfigSource]
    model: list[ConfigSource]
    script: ConfigSource
    datasets: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, sources: Sequence[ConfigSource]) -> RunSources:
        """Sorts keys as users write them: KEY, model.KEY, default.KEY, data.TASK.KEY."""
        train, model, script, datasets = [], [], dict[str, Any](), dict[str, dict[str, Any]]()
        for source in sources:
            own, of_model = dict[str, Any](), dict[str, Any]()
            for name, value in source.values.items():
                section, _, key = name.partition(".")
                if section == "model" and key:
                    of_model[key] = value
                elif section == "default" and key:
                    script[key] = value
                elif section == "data" and "." in key:
                    task, _, task_key = key.rpartition(".")
                    datasets.setdefault(task, {})[task_key] = value
                else:
                    own[name] = value
            train.append(replace(source, values=own))
            where = f"{source.origin} (--model.)" if source.origin == COMMAND_LINE else source.origin
            model += [replace(source, origin=where, values=of_model)] if of_model else []
        return cls(train, model, ConfigSource(LAUNCH_SCRIPT, script, text=True), datasets)


def load_run(name: str, overrides: dict[str, str], complete: bool = True) -> RunConfig:
    """The configuration of a run without `model` and `data`; fm9g.shorthand.load knows those, too.

    Args:
        overrides: KEY, default.KEY, model.KEY or data.TASK.KEY -> text.
        complete: raise UserError if a run could not start because a key is missing; False: log it.
    """
    sources = RunSources.of([ConfigSource(COMMAND_LINE, overrides, text=True)])
    train = load_train_config(name, sources.train, sources.script)
    model = resolve_model_config(require_config("model_configs", train.value.config), sources.model)
    return combine_run(
        train,
        model,
        resolve_datasets(train.value.dataset_config, sources.datasets),
        resolve_datasets(train.value.val_dataset, {}),
        complete,
    )


def combine_run(
    train: Resolved[TrainConfig],
    model: Resolved[ModelConfig],
    mixture: list[Resolved[DatasetConfig]],
    validation: list[Resolved[DatasetConfig]],
    complete: bool = True,
) -> RunConfig:
    """The run of these parts. Logs what the user should know about the keys.

    Args:
        complete: raise UserError if a run could not start because a key is missing; False: log it.
    """
    train = _with_model_checkpointing(train, model)
    missing = [] if mixture else ["data" if train.value.model else "dataset_config"]
    missing += [] if train.value.tokenizer_path else ["tokenizer_path"]
    if missing and complete:
        raise UserError(*(f"{key}: missing; give --{key}{_OR_IN_FILE.get(key, '')}" for key in missing))
    for note in train.notes:
        logger.warning(note)
    for note in model.notes:
        logger.info(note)
    if missing:
        logger.info(f"not given, but needed for training: {', '.join(f'--{key}' for key in missing)}")
    origins = {"train": train.origins, "model": model.origins}
    for prefix, datasets in (("data", mixture), ("val", validation)):
        for dataset in datasets:
            inherited = {key: train.origins[of] for key, (_, of) in _inherited(dataset.value, train.value).items()}
            origins[f"{prefix}.{dataset.value.task_name}"] = dataset.origins | inherited
    return RunConfig(
        train.value,
        model.value,
        [with_defaults(dataset.value, train.value) for dataset in mixture],
        [with_defaults(dataset.value, train.value) for dataset in validation],
        origins,
    )


def resolve_datasets(name: str, overrides: dict[str, dict[str, str]]) -> list[Resolved[DatasetConfig]]:
    """The datasets of a mixture, by its name or path; none without a name."""
    return resolve_mixture(require_config("dataset_configs", name), overrides) if name else []


def _with_model_checkpointing(train: Resolved[TrainConfig], model: Resolved[ModelConfig]) -> Resolved[TrainConfig]:
    """The training configuration with the model's use_checkpoint, unless the training configuration sets its own."""
    origins = {key: train.origins[key] for key in ("use_checkpoint", "activation_checkpoint")}
    given = [key for key, origin in origins.items() if origin != "default"]
    same_origin = len(given) == 2 and len(set(origins.values())) == 1  # a command line overrides a file
    if same_origin and train.value.use_checkpoint and train.value.checkpointing != "full":
        raise UserError(
            f"{origins['use_checkpoint']}: use_checkpoint true and activation_checkpoint {train.value.checkpointing} "
            "are both given; keep one of them"
        )
    if given or not model.value.use_checkpoint:
        return train
    return train.with_values({"use_checkpoint": True}, model.origins["use_checkpoint"])
