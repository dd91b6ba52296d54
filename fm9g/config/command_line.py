"""The `--key value` words of a command line, which are no options of its parser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fm9g.config.fields import field_schema, keys_of
from fm9g.config.load import COMMAND_LINE, CONFIG_SUFFIXES
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError

SECTIONS = ("model.", "data.", "default.")  # prefixes of keys that are not those of the training
LISTS = ("data", "val_data")  # texts in which commas separate entries, as in a list


def parse_words(words: Sequence[str]) -> dict[str, list[str]]:
    """Key -> its values: of `--key v1 v2 --key=value --flag`. A flag has no value.

    Raises UserError for a word before the first key, for one dash before a key, and for a key that is given twice.
    """
    parsed: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if re.match("-[A-Za-z]", word):
            raise UserError(f"{COMMAND_LINE}: found {word!r}, expected --key value; did you mean -{word}?")
        if not word.startswith("--"):
            if values is None:
                key, equals, value = word.partition("=")
                hint = f"; did you mean --{key} {value}?" if equals and key else ""
                raise UserError(f"{COMMAND_LINE}: found {word!r}, expected --key value{hint}")
            values.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        section, dot, name = key.rpartition(".")  # of data.TASK.KEY, the task stays as it is
        key = section + dot + name.replace("-", "_")
        if not key:
            raise UserError(f"{COMMAND_LINE}: found {word!r}, expected --key value")
        if key in parsed:
            raise UserError(f"{COMMAND_LINE}: --{key} is given twice; keep one of them")
        values = parsed[key] = [value] if equals else []
    return parsed


def single_values(parsed: dict[str, list[str]]) -> dict[str, str]:
    """Key -> value, for keys of fm9g. Several values are possible for lists, none for truth values.

    Raises UserError for a key without a value, or with several.
    """
    fields = keys_of(TrainConfig)
    single: dict[str, str] = {}
    for key, values in parsed.items():
        kind = field_schema(fields[key])["type"] if key in fields else ""
        if not values and kind != "boolean":
            raise UserError(f"{COMMAND_LINE}: --{key}: its value is missing")
        if len(values) > 1 and kind != "array" and key not in LISTS:
            hint = "; a run file is the first word" if values[1].endswith(CONFIG_SUFFIXES) else ""
            raise UserError(f"{COMMAND_LINE}: found {values[1]!r}, expected --key value{hint}")
        single[key] = ",".join(values) if values else "true"
    return single


def is_own_key(key: str, aliases: dict[str, str]) -> bool:
    """Whether a name is a key of fm9g. aliases: further names of training keys."""
    known: Any = (keys_of(TrainConfig), aliases)
    return key.startswith(SECTIONS) or any(key in names for names in known)
