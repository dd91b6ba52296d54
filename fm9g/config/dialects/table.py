"""The table of a dialect: one row per argument of another tool.

Row("learning_rate", "lr", default=5e-5)                            a key of ours, and the default there
Row("weight_decay", "weight_decay", default=0.0, note="...")        with a difference that users should know
Row("num_train_epochs", rule=training_length, default=3.0)          several arguments decide together
Row("ddp_timeout", ignored="processes are supervised by ...")       accepted; it has no effect on the result
Row("use_galore", refused="... write optimizer muon", harmless=(False,))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError

UNSET: Any = object()  # no default of its own: the key of ours keeps the one of ours


@dataclass(frozen=True)
class Given:
    """The arguments that a rule reads: those that the user gave, over the defaults of the dialect.

    Args:
        values: name in the dialect -> value, as the user wrote it or typed.
        given: the names that the user gave.
        prefix: what messages put before the name of an argument.
        notes: what the user should know; rules append to it.
    """

    values: Mapping[str, Any]
    given: frozenset[str] = frozenset()
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        """The value of an argument, of its type; None if it was not given and has no default."""
        return parse_text(self.values.get(name))

    def text(self, name: str) -> str:
        """The value of an argument as a text, such as a path, several with commas; empty if there is none."""
        value = self.values.get(name)
        if isinstance(value, list):
            return ",".join(map(str, value))
        return "" if parse_text(value) in (None, False) else str(value)

    def first(self, *names: str) -> str:
        """The text of the first of several arguments that has one; empty if none has."""
        return next((text for name in names if (text := self.text(name))), "")

    def number(self, name: str) -> float | None:
        """The value of an argument that must be a number; None if there is none. Raises UserError."""
        value = self[name]
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return value
        raise self.error(name, f"found {value!r}, expected a number")

    def flag(self, name: str) -> bool:
        """The value of an argument that must be true or false; False if there is none. Raises UserError."""
        value = self[name]
        if value in (None, 0, 1, True, False):
            return bool(value)
        raise self.error(name, f"found {value!r}, expected true or false")

    def choice(self, name: str, *allowed: str) -> str:
        """The value of an argument that must be one of some words, in lower case; empty if there is none."""
        if self[name] is False and "no" in allowed:  # YAML reads the word no as false
            return "no"
        value = self.text(name).lower()
        if value and value not in allowed:
            raise self.error(
                name, f"found {value!r}, expected one of {', '.join(allowed)}{did_you_mean(value, [*allowed])}"
            )
        return value

    def error(self, name: str, problem: str) -> UserError:
        """A mistake in an argument."""
        return UserError(f"{self.prefix}{name}: {problem}")


Keys = dict[str, Any]  # our key -> value: training keys, and model.KEY
Convert = Callable[[Any], Any]  # raises ValueError that says what is expected
Rule = Callable[[Given], Keys]  # raises UserError


@dataclass(frozen=True)
class Row:
    """What one argument means here. One of `ours`, `rule`, `ignored` and `refused` is set.

    Args:
        name: of the argument in the dialect.
        ours: the key of ours that takes the value.
        convert: from their value to ours; None: the same value.
        default: theirs, which applies where the user leaves the argument out; UNSET: nothing does.
        rule: computes keys of ours from this and other arguments; it is called once for all rows that name it.
        note: what is slightly different here.
        ignored: why the argument has no effect on the result here.
        refused: why the argument is refused, and what to write instead.
        harmless: values with which a refused argument is accepted.
        aliases: further names of the argument.
        label: what a form calls it.
    """

    name: str
    ours: str = ""
    convert: Convert | None = None
    default: Any = UNSET
    rule: Rule | None = None
    note: str = ""
    ignored: str = ""
    refused: str = ""
    harmless: tuple[Any, ...] = ()
    aliases: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Dialect:
    """The arguments of one tool.

    Args:
        name: what `--from` takes.
        title: what messages call the tool.
        rows: of its arguments.
        version: of the tool whose arguments these are; empty: none is meant.
        distinctive: names that no other tool has; one of them decides between dialects that share the others.
        file_argument: name of the argument that gives a file with all other arguments; empty: there is none.
        constants: our key -> value, for what the tool always does.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    version: str = ""
    distinctive: tuple[str, ...] = ()
    file_argument: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)

    def row_of(self, name: str) -> Row | None:
        """The row of an argument, by its name or one of its aliases."""
        return self.by_name.get(name)

    @cached_property
    def by_name(self) -> dict[str, Row]:
        """Name or alias of an argument -> its row."""
        return {name: row for row in self.rows for name in (row.name, *row.aliases)}


def extend(base: tuple[Row, ...], *rows: Row) -> tuple[Row, ...]:
    """The rows of a dialect that is built on another one: rows of the same name take the place of those in the base."""
    own = {row.name for row in rows}
    return (*(row for row in base if row.name not in own), *rows)


_WORDS = {"true": True, "false": False, "none": None, "null": None, "": None}


def parse_text(value: Any) -> Any:
    """The value that a text spells: a truth value, a number, None, a JSON list or object; else the text itself."""
    if not isinstance(value, str):
        return [parse_text(item) for item in value] if isinstance(value, list) else value
    text = value.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError:
            return value
    try:
        number = float(text)
    except ValueError:
        return value
    if "_" in text or not math.isfinite(number):  # 1_000, inf and nan are words here
        return value
    return int(text) if text.lstrip("+-").isdecimal() else number
