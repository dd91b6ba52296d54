"""Keys of a configuration: one dataclass field defines type, default, help text and JSON schema of a key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any

from fm9g.errors import UserError

_MAX_SHOWN = 5  # wrong keys that a message names
_JSON_TYPES: dict[str, Any] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "int | float": {"type": ["integer", "number"]},  # whole numbers stay integers, also from the command line
    "str": {"type": "string"},
    "str | None": {"type": ["string", "null"]},
    "float | None": {"type": ["number", "null"]},
    "int | None": {"type": ["integer", "null"]},
    "list[float]": {"type": "array", "items": {"type": "number", "minimum": 0}},
    "list[str]": {"type": "array", "items": {"type": "string", "minLength": 1}},
}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    key: str = "",
    aliases: tuple[str, ...] = (),
    value_aliases: dict[str, str] | None = None,
    case_insensitive: bool = False,
    **schema: Any,
) -> Any:
    """A dataclass field that is also a key of a configuration file.

    A class of options may define FOREIGN_KEYS, or a function that returns them, for hints about
    keys of other tools: see fm9g.config.foreign.

    Args:
        default: of the key, copied if it is a list; without a default the key is required.
        help: what the key does, its unit, and what 0 or empty means.
        key: its name in files and on the command line, if that differs from the attribute.
        aliases: further names of the key, accepted everywhere.
        value_aliases: former spelling of a value -> present spelling.
        case_insensitive: convert the value to lower case before checking it.
        schema: further JSON schema keywords (minimum, enum, ...).
    """
    metadata = {
        "help": help,
        "key": key,
        "aliases": aliases,
        "value_aliases": value_aliases or {},
        "case_insensitive": case_insensitive,
        "schema": schema,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> str:
    return field.metadata["key"] or field.name


def default_value(field: dataclasses.Field[Any]) -> Any:
    """The value of a key that is not given."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def keys_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """File key -> field, in the order of declaration."""
    return {key_of(field): field for field in dataclasses.fields(cls)}


def aliases_of(cls: type) -> dict[str, str]:
    """Alias -> key."""
    return {alias: key for key, field in keys_of(cls).items() for alias in field.metadata["aliases"]}


def canonical_keys(cls: type, values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Replaces aliases by keys. Raises UserError if a key is given under two of its names."""
    aliases, given = aliases_of(cls), dict[str, str]()
    for name in values:
        key = aliases.get(name, name)
        if key in given:
            raise UserError(f"{origin}: {given[key]} and {name} are both given; they are the same, keep one of them")
        given[key] = name
    return {key: values[name] for key, name in given.items()}


def canonical_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """The present spelling of a value."""
    if not isinstance(value, str):
        return value
    value = value.lower() if field.metadata["case_insensitive"] else value
    return field.metadata["value_aliases"].get(value, value)


def field_schema(field: dataclasses.Field[Any]) -> dict[str, Any]:
    return {**_JSON_TYPES[str(field.type)], **field.metadata["schema"]}


def schema_of(cls: type) -> dict[str, Any]:
    """The JSON schema (2020-12) of a configuration class."""
    fields = keys_of(cls)
    no_default = dataclasses.MISSING
    return {
        "type": "object",
        "properties": {key: {**field_schema(f), "description": f.metadata["help"]} for key, f in fields.items()},
        "required": [key for key, f in fields.items() if f.default is no_default and f.default_factory is no_default],
        "additionalProperties": False,
    }


def did_you_mean(word: str, known: list[str]) -> str:
    """A hint for a misspelt word, or an empty string."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def parse_value(text: str, field: dataclasses.Field[Any]) -> Any:
    """The value that a string on the command line spells; the string itself if it is not of the type of the key.

    The 9G guide writes every value as a string ("4096", "False", "1e-2", "0" for no), so training
    configurations are read the same way.
    """
    kinds = field_schema(field)["type"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "boolean" in kinds and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    if "null" in kinds and text.lower() in ("none", "null"):
        return None
    if "integer" in kinds or "number" in kinds:
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if number.is_integer() and "integer" in kinds else number
    if "array" in kinds:
        try:
            items = json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
        except ValueError:
            words = [word.strip() for word in text.split(",")]
            return [word for word in words if word] if str(field.type) == "list[str]" and "[" not in text else text
        return [float(item) if isinstance(item, int) else item for item in items]
    return text


def check(cls: type, values: dict[str, Any], origins: dict[str, str], prefix: str = "") -> None:
    """Raises UserError that names every wrong key with its origin, its value and the allowed values."""
    import jsonschema  # here, since reading a command line does not need it

    errors = []
    known = list(keys_of(cls))
    for error in jsonschema.Draft202012Validator(schema_of(cls)).iter_errors(values):
        if error.validator == "additionalProperties":
            for key in sorted(set(values) - set(known)):
                hint = (
                    _foreign_hint(cls, key) or did_you_mean(key, known) or "; `fm9g config keys` lists the known ones"
                )
                errors.append(f"{origins[key]}: {prefix}{key}: unknown key{hint}")
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in values]
            where = next(iter(origins.values()), "defaults")
            errors += [f"{where}: {prefix}{key}: missing, and it has no default" for key in missing]
        else:
            key = str(error.absolute_path[0])
            path = prefix + ".".join(str(part) for part in error.absolute_path)
            allowed = describe(schema_of(cls)["properties"][key])
            hint = did_you_mean(str(error.instance), [str(v) for v in error.schema.get("enum", [])])
            errors.append(f"{origins[key]}: {path}: found {error.instance!r}, allowed: {allowed}{hint}")
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(_is_bounded(number) for number in numbers):
            items = f"{origins[key]}: {prefix}{key}: found {value!r:.60}"
            errors.append(f"{items}, expected a finite number up to 2^53")
    for key, value in values.items():
        if isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
            errors.append(
                f"{origins[key]}: {prefix}{key}: found {value!r}, which contains characters that are not text"
            )
    if errors := list(dict.fromkeys(errors)):
        more = [f"and {len(errors) - _MAX_SHOWN} more"] if len(errors) > _MAX_SHOWN else []
        raise UserError(*errors[:_MAX_SHOWN], *more)


def _foreign_hint(cls: type, key: str) -> str:
    """A hint for a key of another tool, or an empty string."""
    hints = cls.__dict__.get("FOREIGN_KEYS", {})
    name, colon, remark = (hints() if callable(hints) else hints).get(key, "").partition(":")
    if not name:
        return ""
    if name == "nothing":
        return f"; it is not needed here:{remark}"
    called = f"it is called {name} here" if name.isidentifier() else f"write {name}"
    return f"; {called}{colon}{remark}"


def _is_bounded(value: Any) -> bool:
    """Whether a value is finite, and an integer exact as a float. True for what is not a number."""
    return abs(value) <= 2**53 if isinstance(value, int) else not isinstance(value, float) or math.isfinite(value)


def describe(schema: dict[str, Any]) -> str:
    """The values that a schema allows, in words."""
    if "const" in schema:
        return f"only {schema['const']!r}"
    if "enum" in schema:
        return "one of " + ", ".join(repr(value) for value in schema["enum"])
    kinds = schema["type"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    text = " or ".join("true or false" if kind == "boolean" else kind for kind in kinds)
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[word]}" for word, sign in bounds.items() if word in schema]
    if schema.get("minLength"):
        limits.append("not empty")
    return " ".join([text, " and ".join(limits)]).strip()
