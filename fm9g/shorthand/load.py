"""The configuration of a run from what a user types: a run file, `model`, `data`, `method`, and `--key value` words.

words, run file ──> are all keys ours? ──no──> a dialect translates them
                          └──yes──> sources, from the lowest precedence to the highest:
    defaults < what the model says < defaults of the method < --default.KEY < train_configs/ < run file < command line
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fm9g.config.command_line import LISTS, is_own_key, parse_words, single_values
from fm9g.config.dialects.table import Dialect
from fm9g.config.dialects.translate import Translation, detect, dialects, find_dialect, translate
from fm9g.config.fields import aliases_of, canonical_keys, check
from fm9g.config.load import COMMAND_LINE, CONFIG_SUFFIXES, ConfigSource, Resolved, find_config, require_config
from fm9g.config.mixture import DatasetConfig
from fm9g.config.model import ModelConfig, override_model_config, resolve_model_config
from fm9g.config.run import PATH_KEYS, RunConfig, RunSources, combine_run, resolve_datasets
from fm9g.config.train import TrainConfig
from fm9g.config.train_file import load_train_config, read_named
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object
from fm9g.path_kind import TRAIN_CONFIG, kind_of
from fm9g.shorthand.data import resolve_data
from fm9g.shorthand.data_entry import SAMPLE_AND_SHARE
from fm9g.shorthand.method import FULL, LORA, METHOD_DEFAULTS, finetuning_source, method_source
from fm9g.shorthand.model import ModelDescription, describe_model, format_description

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunArguments:
    """What a user gave to describe a run.

    Args:
        config: a name in train_configs/ or model_configs/, or the path of such a file.
        file: a run file: YAML or JSON with any keys, of fm9g or of a dialect.
        dialect: the tool whose arguments file and words are; empty: recognized by their names.
        words: `--key value` as on the command line.
        values: further keys of fm9g, as text.
    """

    config: str = ""
    file: str = ""
    dialect: str = ""
    words: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.config or self.file or self.words or self.values)


@dataclass(frozen=True)
class RunKeys:
    """The keys of fm9g that a user gave, or that what he gave means.

    Args:
        config: the name of a configuration; empty: none is named.
        sources: from the lowest precedence to the highest.
        translation: of the arguments of another tool; None: they are ours.
    """

    config: str
    sources: list[ConfigSource]
    translation: Translation | None = None


def split_file(words: list[str]) -> tuple[str, list[str]]:
    """The run file, which is the first word if it has no dashes, and the other words."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    return "", words


def load_run(arguments: RunArguments, complete: bool = True, prepare_data: bool = True) -> RunConfig:
    """Loads the configuration of a run, and logs what the user should know about it.

    Args:
        complete: raise UserError if a run could not start because a key is missing; False: log it.
        prepare_data: index the files of `data` that are not in the cache yet.

    Raises:
        UserError: names the file, the key or the word.
    """
    found = read_sources(arguments)
    name, sources = found.config, found.sources
    if found.translation:
        _log_notes(found.translation)
    given = _merged(sources, name)
    model_name = given.get("model") or ""
    if not isinstance(model_name, str):
        raise UserError(f"{arguments.file}: model: found {model_name!r}, expected a folder or a name, as text")
    described = describe_model(model_name) if model_name else None
    if described is None and not name:
        _check_known(sources)  # a misspelt `model` is the likelier mistake
        raise UserError(
            "give a model: --model DIR, or --config NAME for a name in train_configs/ or model_configs/, or a run file"
        )
    if described and described.is_random:
        name = name or described.keys["config"]
    parts = RunSources.of(sources)
    parts.train[:] = _without_epochs(parts.train)
    base, model = _describe(described, parts, given)
    train = load_train_config(name, parts.train, parts.script, base)
    _check_one_model(described, train)
    if model is None:
        model = resolve_model_config(require_config("model_configs", train.value.config), parts.model)
    if described:
        logger.info(format_description(model.value, train.value))
    mixture, validation = _resolve_all_data(train, parts, prepare_data)
    return combine_run(train, model, mixture, validation, complete)


def _log_notes(translation: Translation) -> None:
    for note in translation.notes:
        logger.info(note)
    if without_effect := [name for names in translation.ignored.values() for name in names]:
        logger.info(f"without effect here: {', '.join(without_effect)}; `fm9g config translate` says why")


def read_sources(arguments: RunArguments) -> RunKeys:
    """The name of the configuration, and the keys of the run file and the command line, translated if need be."""
    content: dict[str, Any] = {}
    name, path = arguments.config, Path(arguments.file)
    if arguments.file:
        if kind_of(path) == TRAIN_CONFIG:  # {"pretrain": {...}}
            if arguments.dialect:
                raise UserError(f"{path}: is a file of fm9g; leave out --from {arguments.dialect}")
            words = parse_words(_words(arguments))
            return RunKeys(_with_name(name, arguments.file), [_word_source(arguments, words)])
        if not path.exists() and not path.suffix:
            raise UserError(f"{COMMAND_LINE}: found {arguments.file!r}, expected --key value, or a run file first")
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a run file; a model is given as --model, data as --data")
        if path.suffix.lower() not in CONFIG_SUFFIXES:
            raise UserError(
                f"{path}: expected a run file, whose name ends in {', '.join(CONFIG_SUFFIXES)}; data is given as --data"
            )
        content = read_config_object(path)
        if not content:
            raise UserError(f"{path}: is empty; expected keys and values, such as model: DIR")
    dialect = _dialect_of(arguments, content)
    translation = None
    if dialect:
        sources, translation = _translated_sources(arguments, content, dialect)
    else:
        sources = [_file_source(content, path)] if content else []
        sources.append(_word_source(arguments, parse_words(_words(arguments))))
    for source in sources:
        if "config" in source.values:
            values = dict(source.values)
            named = values.pop("config")
            if not isinstance(named, str):
                raise UserError(f"{source.origin}: config: found {named!r}, expected a name or a file, as text")
            name = _with_name(name, named)
            sources[sources.index(source)] = replace(source, values=values)
    return RunKeys(name, sources, translation)


def _with_name(name: str, other: str) -> str:
    if name and other != name:
        raise UserError(f"two configurations are given, {name} and {other}; keep one of them")
    return other


def _dialect_of(arguments: RunArguments, content: dict[str, Any]) -> Dialect | None:
    """The dialect of the arguments; None: they are of fm9g."""
    aliases = aliases_of(TrainConfig)
    words = [word.removeprefix("--").partition("=")[0] for word in arguments.words if word.startswith("--")]
    names = [*content, *words]
    if arguments.dialect:
        dialect = find_dialect(arguments.dialect)
    elif all(is_own_key(name.replace("-", "_"), aliases) for name in names):
        return None
    else:
        found = detect(names) or (detect(content) if content else None) or _closest(names, aliases)
        if found is None:
            return None  # the keys are then checked as ours, and the message names the unknown ones
        dialect = found
    logger.info(f"read as arguments of {dialect.title}")
    return dialect


def _closest(names: list[str], aliases: dict[str, str]) -> Dialect | None:
    """The dialect that knows most of the names, if fm9g knows fewer: its message names those that are misspelt."""

    def known(dialect: Dialect) -> int:
        return sum(dialect.row_of(name.replace("-", "_")) is not None for name in names)

    closest = max(dialects().values(), key=known)
    return closest if known(closest) > sum(is_own_key(name.replace("-", "_"), aliases) for name in names) else None


def _words(arguments: RunArguments) -> list[str]:
    """The words of the command line. Behind a file, KEY=VALUE is --KEY=VALUE, as LLaMA-Factory writes it."""
    if not arguments.file:
        return list(arguments.words)
    return [f"--{word}" if "=" in word and not word.startswith("-") else word for word in arguments.words]


def _file_source(content: dict[str, Any], path: Path) -> ConfigSource:
    """The keys of a run file."""
    values = dict(content)
    for key in LISTS:
        value = content.get(key)
        if isinstance(value, list):
            if wrong := [item for item in value if not isinstance(item, str)]:
                raise UserError(f"{path}: {key}: found {wrong[0]!r}, expected files or names of datasets, as text")
            values[key] = ",".join(value)
    return ConfigSource(str(path), _beside(values, path.parent), text=True)


def _word_source(arguments: RunArguments, words: dict[str, list[str]]) -> ConfigSource:
    """The keys of the command line that are ours."""
    return ConfigSource(COMMAND_LINE, {**arguments.values, **single_values(words)}, text=True)


def _translated_sources(
    arguments: RunArguments, content: dict[str, Any], dialect: Dialect
) -> tuple[list[ConfigSource], Translation]:
    """The keys of a file and of words in a dialect. Words beside a file may be ours, too."""
    parsed = parse_words(_words(arguments))
    aliases = aliases_of(TrainConfig)
    theirs: dict[str, Any] = {}
    for key in list(parsed):
        if dialect.row_of(key) or not (arguments.file and is_own_key(key, aliases)):
            values = parsed.pop(key)
            theirs[key] = True if not values else values[0] if len(values) == 1 else values
    rows = {row.name for key in theirs if (row := dialect.row_of(key))}
    kept = {
        key: value for key, value in content.items() if (row := dialect.row_of(key)) is None or row.name not in rows
    }
    origin = arguments.file or COMMAND_LINE
    translation = translate(dialect, {**kept, **theirs}, origin)
    by_origin: dict[str, dict[str, Any]] = {}
    for key, value in _beside(translation.keys, Path(arguments.file).parent).items():
        where = translation.origins[key]
        named = where.removeprefix(f"{origin}: ").split(", ")
        if arguments.file and set(named) & theirs.keys():
            where = f"{COMMAND_LINE}: {', '.join(f'--{name}' for name in named)}"
        by_origin.setdefault(where, {})[key] = value
    sources = [ConfigSource(where, values, text=True) for where, values in by_origin.items()]
    return [*sources, _word_source(arguments, parsed)], translation


def _beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths that exist beside the run file and not in the current folder are taken from there."""

    def found(value: str) -> str:
        path = SAMPLE_AND_SHARE.sub("", value)
        is_beside = path and not os.path.exists(path) and os.path.exists(folder / path)
        return str(folder / value) if is_beside else value

    moved = dict(values)
    for key, value in values.items():
        if key.rpartition(".")[2] in PATH_KEYS and isinstance(value, str):
            parts = value.split(",") if key in LISTS and found(value) == value else [value]
            moved[key] = ",".join(found(part.strip()) for part in parts)
    return moved


def _without_epochs(sources: list[ConfigSource]) -> list[ConfigSource]:
    """The sources, where a train_iters takes the place of an `epochs` of lower precedence."""
    changed = []
    for source in sources:
        keys = canonical_keys(TrainConfig, source.values, source.origin)
        instead = {"epochs": 0} if "train_iters" in keys and "epochs" not in keys else {}
        changed.append(replace(source, values={**source.values, **instead}))
    return changed


def _merged(sources: list[ConfigSource], name: str) -> dict[str, Any]:
    """Training key -> value of all sources, to decide what else is read. name: of a file in train_configs/."""
    merged: dict[str, Any] = {}
    parts = RunSources.of(sources)
    for source in [parts.script, *(read_named(name)[1] if name else []), *parts.train]:
        merged |= canonical_keys(TrainConfig, source.values, source.origin)
    return merged


def _check_known(sources: list[ConfigSource]) -> None:
    """Raises UserError that names the unknown training keys."""
    aliases = aliases_of(TrainConfig)
    unknown = {key: source for source in sources for key in source.values if not is_own_key(key, aliases)}
    check(TrainConfig, dict.fromkeys(unknown), {key: source.origin for key, source in unknown.items()})


def _describe(
    described: ModelDescription | None, parts: RunSources, given: dict[str, Any]
) -> tuple[list[ConfigSource], Resolved[ModelConfig] | None]:
    """The sources below all others, and the model if it does not come from a configuration file."""
    asked = str(given.get("method") or "").lower()
    if described is None or described.is_random:
        return ([method_source(asked, set(given))] if asked in METHOD_DEFAULTS else []), None
    assert described.config is not None
    model = override_model_config(described.config, described.origin, parts.model)
    adapters = described.is_adapter or given.get("lora_layer") or given.get("adapter")
    method = asked or (LORA if adapters else FULL)
    names = set(given) | set(described.keys)
    from_model = {key: value for key, value in described.keys.items() if key != "config"}
    base = [ConfigSource(described.origin, from_model), finetuning_source(described, model.value, method, set(given))]
    if not asked:
        base.append(ConfigSource("default with model", {"method": method}))
    if method in METHOD_DEFAULTS:
        base.append(method_source(method, names if described.is_adapter else set(given), described.lora_layers))
    return base, model


def _check_one_model(described: ModelDescription | None, train: Resolved[TrainConfig]) -> None:
    """Raises UserError if a second model is named beside `model`."""
    if described is None:
        return
    named = find_config("model_configs", train.value.config) if train.value.config else None
    if train.value.config and named is None and find_config("train_configs", train.value.config) is None:
        require_config("model_configs", train.value.config)
    if described.config is None:
        differs = train.value.config != described.keys["config"]
    else:  # the file of another training may be for the same architecture
        differs = named is not None and _shape(resolve_model_config(named).value) != _shape(described.config)
    if differs:
        raise UserError(
            f"model {train.value.model} and config {train.value.config} ({train.origins['config']}) are different "
            "models; keep one of them"
        )
    if not described.is_random:
        origin = train.origins["pretrained_model"]
        if origin != described.origin:
            raise UserError(
                f"model {train.value.model} and pretrained_model {train.value.pretrained_model} ({origin}) are both "
                "given; model gives the weights too, keep one of them"
            )


def _shape(model: ModelConfig) -> tuple[int, int, int]:
    return model.num_layers, model.hidden_size, model.vocab_size


def _resolve_all_data(
    train: Resolved[TrainConfig], parts: RunSources, prepare: bool
) -> tuple[list[Resolved[DatasetConfig]], list[Resolved[DatasetConfig]]]:
    config = train.value
    if not (config.data or config.val_data or config.val_split):
        return resolve_datasets(config.dataset_config, parts.datasets), resolve_datasets(config.val_dataset, {})
    found = resolve_data(train, parts.datasets if config.data else {}, prepare)
    training = found.train or resolve_datasets(config.dataset_config, parts.datasets)
    return training, found.validation or resolve_datasets(config.val_dataset, {})
