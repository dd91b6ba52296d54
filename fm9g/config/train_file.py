"""From a training file and the command line to a checked TrainConfig with the origin of each value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm9g.config.fields import canonical_keys, canonical_value, keys_of, parse_value
from fm9g.config.load import (
    COMMAND_LINE,
    ConfigSource,
    Resolved,
    bare_name,
    build,
    find_config,
    resolve_sources,
)
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig
from fm9g.config.train_rules import ADAPTER_KEYS, canonical_layers
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object

LAUNCH_SCRIPT = "launch script (--default.)"


def load_train_config(
    name: str, given: Sequence[ConfigSource], script: ConfigSource, base: Sequence[ConfigSource] = ()
) -> Resolved[TrainConfig]:
    """Reads the training configuration of a run: base < script < train_configs/NAME.json < given.

    Args:
        name: of a file in train_configs/ or else of a model in model_configs/, or the path of either; empty: there is
            no file, and `base` says what the model is.
        given: a run file and the command line.
        script: `--default.key value` from the command line.
        base: what `model` and `method` say.
    """
    if "config" in script.values:
        raise UserError("--default.config: give it as --config")
    named, sections, file = read_named(name) if name or not base else ([], [], None)
    sources = [script, *sections, *given]
    notes = [note for source in sources for note in _deprecated_notes(source)]
    script, *others = [replace(source, values=_without_deprecated(source)) for source in sources]
    resolved = resolve_sources(TrainConfig, [*named, *base, script, *others])
    from_file = {key: value for key, value in script.values.items() if resolved.origins[key] == str(file)}
    if differing := _overridden(resolved.value, from_file):
        notes.append(f"{file} overrides the launch script: {', '.join(differing)}")
    return replace(resolved, notes=tuple(notes))


def read_named(name: str) -> tuple[list[ConfigSource], list[ConfigSource], Path | None]:
    """What --config NAME says: the model and the name of the run; the sections of its file; that file."""
    bare = bare_name(name)
    if not bare:
        raise UserError(f"--config: found {name!r}, expected a name in train_configs/ or model_configs/, or a file")
    file = find_config("train_configs", name)
    sections: list[ConfigSource] = []
    if file is not None and "vocab_size" not in (content := read_config_object(file)):
        sections = _sections(file, content)
        # A training file without the key `config` is for the model of its own name; "7b_lora" also for "7b".
        known = find_config("model_configs", bare) or not bare.endswith("_lora")
        name = bare if known else bare.removesuffix("_lora")
    named = [ConfigSource(COMMAND_LINE, {"config": name}), ConfigSource(f"config {bare}", {"model_unique": bare})]
    return named, sections, file


def _overridden(config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """Describes the given keys whose values differ from the configuration."""
    differing = []
    for key, value in given.items():
        field = keys_of(TrainConfig)[key]
        mine = getattr(config, field.name)
        read = parse_value(canonical_value(field, value), field)
        if (canonical_layers(read) if key == "lora_layer" and isinstance(read, list) else read) != mine:
            differing.append(f"{key} is {mine!r}, not {value!r}")
    return differing


def load_adapter_keys(file: Path) -> TrainConfig:
    """Reads the keys of adapters from a file of train_configs/; all other keys have their defaults."""
    values = {"pretrained_model": str(file)}
    for source in _sections(file, read_config_object(file)):
        values |= {key: value for key, value in source.values.items() if key in ("lora_layer", *ADAPTER_KEYS)}
    return build(TrainConfig, [ConfigSource(str(file), values, text=True)])


def _sections(file: Path, content: dict[str, Any]) -> list[ConfigSource]:
    """The sections of a training file: "pretrain" and, for LoRA, "finetune", which overrides it."""
    for name, values in content.items():
        if name not in ("pretrain", "finetune") or not isinstance(values, dict):
            raise UserError(
                f'{file}: {name}: expected "pretrain" or "finetune", such as {{"pretrain": {{"lr": 1e-5}}}}'
            )
    if not content:
        raise UserError(f'{file}: is empty; expected {{"pretrain": {{...}}}}')
    return [ConfigSource(str(file), content[name], text=True) for name in ("pretrain", "finetune") if name in content]


def _without_deprecated(source: ConfigSource) -> dict[str, Any]:
    """The values under their present keys, without the deprecated ones."""
    values = canonical_keys(TrainConfig, source.values, source.origin)
    return {key: value for key, value in values.items() if key not in DEPRECATED_KEYS}


def _deprecated_notes(source: ConfigSource) -> list[str]:
    given = sorted(DEPRECATED_KEYS.keys() & source.values.keys())
    return [f"{source.origin}: {key} changes nothing: {DEPRECATED_KEYS[key]}" for key in given]
