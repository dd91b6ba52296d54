"""From files and `--key value` to checked, frozen configuration objects that remember where each value came from."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from fm9g.config.fields import canonical_keys, canonical_value, check, did_you_mean, key_of, keys_of, parse_value
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.path_kind import MIXTURE, MODEL, MODEL_CONFIG, TRAIN_CONFIG, check_kind
from fm9g.io.regular_file import check_regular

T = TypeVar("T")
COMMAND_LINE = "command line"
_MAX_BYTES = 64 << 20  # bytes; the lists of weights of the largest models take a few MB


@dataclass(frozen=True)
class ConfigSource:
    """Some values of a configuration and the place they were written in. Later sources win.

    text: values may be strings that spell a number or a truth value, as the 9G guide writes them.
    """

    origin: str
    values: dict[str, Any]
    text: bool = False


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A configuration and, for every key, where its value came from.

    notes: what the user should know about the given keys, a line each.
    """

    value: T
    origins: dict[str, str]
    notes: tuple[str, ...] = ()

    def items(self) -> list[tuple[str, Any, str]]:
        return [(key_of(f), getattr(self.value, f.name), self.origins[key_of(f)]) for f in fields(self.value)]  # type: ignore[arg-type]

    def with_values(self, values: dict[str, Any], origin: str) -> Resolved[T]:
        """The configuration with other values of some keys, from one origin. Raises UserError where they do not fit."""
        names = keys_of(type(self.value))
        value = replace(self.value, **{names[key].name: each for key, each in values.items()})  # type: ignore[type-var]
        return replace(self, value=value, origins=self.origins | dict.fromkeys(values, origin))


def build(cls: type[T], sources: list[ConfigSource], prefix: str = "") -> Resolved[T]:
    """Merges the sources over the defaults and checks the result against the class's schema.

    Raises UserError that names each wrong key with its origin.
    """
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


def read_json(path: Path, is_input: bool = True) -> Any:
    """The content of a JSON file; UserError with file, line and column otherwise. A repeated key is an error.

    is_input: see fm9g.io.inputs; False for what a run wrote itself, and may replace.
    """
    if is_input:
        register_input(path)

    def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f"{path}: key {key!r} is given twice; keep one of them")
            seen[key] = value
        return seen

    check_regular(path, _MAX_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=reject_duplicate_keys)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_object(path: Path, is_input: bool = True) -> dict[str, Any]:
    """As read_json, of a file that holds an object."""
    content = read_json(path, is_input)
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected a JSON object {{...}}")
    return content


def config_folders(kind: str) -> list[Path]:
    """Where `model_configs`, `train_configs` or `dataset_configs` are looked for, first match wins."""
    checkout = Path(__file__).resolve().parents[2]
    return [Path(kind), checkout / kind, Path(sys.prefix) / "share" / "fm9g" / kind]


def bare_name(name: str) -> str:
    """The name of a configuration that is given by its name or its path; it may have dots ("2.4b")."""
    return Path(name).name.removesuffix(".json")


def find_config(kind: str, name: str) -> Path | None:
    """The file that NAME or a path stands for in a configuration folder, or None."""
    if name.endswith(".json") or "/" in name:
        return Path(name) if Path(name).is_file() else None
    for folder in config_folders(kind):
        file = folder / f"{name}.json"
        if file.is_file():
            return file
        if os.path.lexists(file):
            raise UserError(f"{file}: not a file but a folder, a link that leads nowhere, or the like; remove it")
    return None


def require_config(kind: str, name: str) -> Path:
    """As find_config, but a name that is not there is a UserError that lists those that are."""
    path = find_config(kind, name)
    if path is None:
        check_kind(Path(name), *([MIXTURE] if kind == "dataset_configs" else [MODEL_CONFIG, TRAIN_CONFIG, MODEL]))
        known = sorted({bare_name(file.name) for folder in config_folders(kind) for file in folder.glob("*.json")})
        if kind == "model_configs" and (Path(name) / "config.json").is_file():
            stem = Path(name).resolve().name
            raise UserError(
                f"{name!r} is a Hugging Face folder, and not a configuration. `fm9g convert {name} {stem}.pt` makes a "
                f"9G model of it; then give --config {stem}.json --pretrained_model {stem}.pt --tokenizer_path {name}"
            )
        raise UserError(
            f"{name!r} is neither a file nor a name in {kind}/, which has {', '.join(known) or 'none'}"
            f"{did_you_mean(bare_name(name), known)}"
        )
    return path
