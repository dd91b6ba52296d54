"""From files and `--key value` to checked, frozen configuration objects, with the origin of each value."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from fm9g.config.fields import canonical_keys, canonical_value, check, did_you_mean, key_of, keys_of, parse_value
from fm9g.errors import UserError
from fm9g.io.yaml_file import YAML_SUFFIXES
from fm9g.path_kind import MIXTURE, MODEL, MODEL_CONFIG, TRAIN_CONFIG, check_kind

T = TypeVar("T")
COMMAND_LINE = "command line"
CONFIG_SUFFIXES = (".json", *YAML_SUFFIXES)


@dataclass(frozen=True)
class ConfigSource:
    """Values of a configuration from one place. Later sources override earlier ones.

    Args:
        origin: the place, as messages name it.
        text: values may be strings that spell a number or a truth value, as the 9G guide writes them.
    """

    origin: str
    values: dict[str, Any]
    text: bool = False


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A configuration with the origin of each value. Used inside fm9g.config; others get the plain configuration.

    Args:
        origins: key -> origin.
        notes: messages for the user about the given keys.
    """

    value: T
    origins: dict[str, str]
    notes: tuple[str, ...] = ()

    def items(self) -> list[tuple[str, Any, str]]:
        return [(key_of(f), getattr(self.value, f.name), self.origins[key_of(f)]) for f in fields(self.value)]  # type: ignore[arg-type]

    def with_values(self, values: dict[str, Any], origin: str) -> Resolved[T]:
        """Returns a copy in which some keys have other values, all from one origin."""
        names = keys_of(type(self.value))
        value = replace(self.value, **{names[key].name: each for key, each in values.items()})  # type: ignore[type-var]
        return replace(self, value=value, origins=self.origins | dict.fromkeys(values, origin))


def build(cls: type[T], sources: list[ConfigSource], prefix: str = "") -> T:
    """Merges the sources over the defaults and checks the result against the schema of the class.

    Raises:
        UserError: names each wrong key with its origin.
    """
    return resolve_sources(cls, sources, prefix).value


def resolve_sources(cls: type[T], sources: list[ConfigSource], prefix: str = "") -> Resolved[T]:
    """Does the same as `build`, and returns the origin of each value as well."""
    known = keys_of(cls)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source in sources:
        for key, value in canonical_keys(cls, source.values, source.origin).items():
            if source.text and key in known:
                if isinstance(value, str):
                    value = parse_value(value, known[key])
                elif known[key].type == "bool" and value in (0, 1):
                    value = bool(value)
            values[key] = canonical_value(known[key], value) if key in known else value
            origins[key] = source.origin
    check(cls, values, origins or {"": sources[0].origin}, prefix)
    kwargs = {}
    for key, value in values.items():
        kind = known[key].type
        exact = int(value) if kind == "int" else float(value) if kind == "float" else value
        kwargs[known[key].name] = exact
    try:
        config = cls(**kwargs)
    except UserError as error:  # a rule between several keys, from __post_init__
        raise UserError(f"{', '.join(dict.fromkeys(origins.values()))}: {prefix}{error}") from None
    return Resolved(config, {key: origins.get(key, "default") for key in known})


def config_folders(kind: str) -> list[Path]:
    """The folders in which a file of `model_configs`, `train_configs` or `dataset_configs` is searched, in order."""
    checkout = Path(__file__).resolve().parents[2]
    return [Path(kind), checkout / kind, Path(sys.prefix) / "share" / "fm9g" / kind]


def bare_name(name: str) -> str:
    """The name of a configuration that is given by name or path. It may contain dots ("2.4b")."""
    path = Path(name)
    return path.stem if path.suffix in CONFIG_SUFFIXES else path.name


def find_config(kind: str, name: str) -> Path | None:
    """The configuration file for a name or path, or None."""
    if name.endswith(CONFIG_SUFFIXES) or "/" in name:
        return Path(name) if Path(name).is_file() else None
    for file in (folder / f"{name}{suffix}" for folder in config_folders(kind) for suffix in CONFIG_SUFFIXES):
        if file.is_file():
            return file
        if os.path.lexists(file):
            raise UserError(f"{file}: is not a file but a folder or a broken link; remove it")
    return None


def known_configs(kind: str) -> list[str]:
    """The names of all configurations of a kind."""
    files = (file for folder in config_folders(kind) for file in folder.glob("*.*") if file.suffix in CONFIG_SUFFIXES)
    return sorted({bare_name(file.name) for file in files})


def require_config(kind: str, name: str) -> Path:
    """The configuration file for a name or path. Raises UserError, which lists the known names."""
    path = find_config(kind, name)
    if path is None:
        check_kind(Path(name), *([MIXTURE] if kind == "dataset_configs" else [MODEL_CONFIG, TRAIN_CONFIG, MODEL]))
        known = known_configs(kind)
        if kind == "model_configs" and (Path(name) / "config.json").is_file():
            raise UserError(f"{name!r} is a Hugging Face folder, not a configuration; give it as --model {name}")
        raise UserError(
            f"{name!r} is neither a file nor a name in {kind}/, which has {', '.join(known) or 'none'}"
            f"{did_you_mean(bare_name(name), known)}"
        )
    return path
