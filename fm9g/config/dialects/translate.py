"""Translates the arguments of another tool into keys of fm9g, by the table of its dialect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.config.command_line import is_own_key
from fm9g.config.dialects.table import UNSET, Dialect, Given, Row, parse_text
from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object

_MAX_SHOWN = 8  # mistakes that a message lists


@dataclass(frozen=True)
class Translation:
    """Arguments of another tool, translated.

    Args:
        keys: our key -> value: training keys, and model.KEY.
        origins: our key -> the argument that sets it, such as "run.yaml: learning_rate".
        notes: what the user should know.
        ignored: reason -> the given arguments that have no effect for it.
    """

    dialect: Dialect
    keys: dict[str, Any]
    origins: dict[str, str]
    notes: tuple[str, ...]
    ignored: dict[str, list[str]]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, with those on arguments without effect."""
        return (*self.notes, *(f"{', '.join(names)}: no effect here: {why}" for why, names in self.ignored.items()))


def dialects() -> dict[str, Dialect]:
    """All dialects by name, in the order in which they are tried."""
    from fm9g.config.dialects import all_dialects

    return {dialect.name: dialect for dialect in all_dialects()}


def find_dialect(name: str) -> Dialect:
    """The dialect that `--from NAME` means. Raises UserError for an unknown one."""
    known = dialects()
    if name not in known:
        raise UserError(f"--from: found {name!r}, expected one of {', '.join(known)}{did_you_mean(name, [*known])}")
    return known[name]


def detect(names: Iterable[str]) -> Dialect | None:
    """The dialect that has arguments of all these names; None: there is none.

    Several tools share names. The one with the most distinctive names is meant, then the one with the fewest arguments;
    without any distinctive name the first one.
    """
    given = {name.replace("-", "_") for name in names}
    knowing = [dialect for dialect in dialects().values() if given <= dialect.by_name.keys()]

    def distance(dialect: Dialect) -> tuple[int, int]:
        hits = len(given & set(dialect.distinctive))
        return -hits, len(dialect.rows) if hits else 0

    return min(knowing, key=distance, default=None)


def translate(dialect: Dialect, given: Mapping[str, Any], origin: str) -> Translation:
    """Translates arguments. Those that are left out have the defaults of the dialect.

    Args:
        given: name -> value, typed or as text.
        origin: where they are from: a file, or the command line.

    Raises:
        UserError: names every argument that is unknown, refused, or of a wrong type.
    """
    problems: list[str] = []
    notes: list[str] = []
    prefix = f"{origin}: --" if origin == "command line" else f"{origin}: "
    if dialect.file_argument in given:
        file = str(given[dialect.file_argument])
        if others := sorted(set(given) - {dialect.file_argument, "local_rank"}):
            raise UserError(f"{prefix}{others[0]}: write it into {file}, which has all the arguments")
        return translate(dialect, read_config_object(Path(file)), file)
    values: dict[str, Any] = {}
    names: dict[str, str] = {}  # name of a row -> the name that the user wrote
    for written, value in given.items():
        row = dialect.row_of(written.replace("-", "_")) or dialect.row_of(written)
        if row is None:
            hint = did_you_mean(written, [*dialect.by_name])
            if not hint and is_own_key(written, {}):
                hint = f"; it is a key of fm9g: leave it out here, and give it behind the file, as --{written}"
            problems.append(f"{prefix}{written}: {dialect.title} has no such argument{hint}")
        elif row.name in names:
            problems.append(f"{prefix}{written}: is the same as {names[row.name]}; keep one of them")
        else:
            names[row.name] = written
            values[row.name] = value
            problems += _refusal(row, parse_text(value), f"{prefix}{written}")
    keys, origins = _apply(dialect, values, names, prefix, notes, problems)
    if problems := list(dict.fromkeys(problems)):  # rules that share an argument find the same mistake
        more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
        raise UserError(*problems[:_MAX_SHOWN], *more)
    ignored: dict[str, list[str]] = {}
    for row in dialect.rows:
        if row.ignored and row.name in values:
            ignored.setdefault(row.ignored, []).append(names[row.name])
    return Translation(dialect, keys, origins, tuple(dict.fromkeys(notes)), ignored)


def _refusal(row: Row, value: Any, where: str) -> list[str]:
    if not row.refused or value is None or any(value == harmless for harmless in row.harmless):
        return []
    return [f"{where}: {row.refused}"]


def _apply(
    dialect: Dialect, values: dict[str, Any], names: dict[str, str], prefix: str, notes: list[str], problems: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Our keys and their origins. Adds to notes and problems."""
    defaults = {row.name: row.default for row in dialect.rows if row.default is not UNSET}
    values = {name: value for name, value in values.items() if parse_text(value) is not None or name not in defaults}
    merged = Given(defaults | values, frozenset(values), prefix, notes)
    by_default, by_user = dict(dialect.constants), dict[str, Any]()
    origins = dict.fromkeys(dialect.constants, f"default of {dialect.title}")
    rules: dict[Any, list[Row]] = {}
    for row in dialect.rows:
        is_given = row.name in values
        if is_given and row.note:
            notes.append(f"{names[row.name]}: {row.note}")
        if row.rule:
            rules.setdefault(row.rule, []).append(row)
        elif row.ours and (is_given or row.default is not UNSET):
            value = merged[row.name]
            if value is None:  # as if it was left out
                continue
            try:
                value = row.convert(value) if row.convert else merged.values[row.name]
            except ValueError as error:
                problems.append(f"{prefix}{names.get(row.name, row.name)}: found {value!r}, {error}")
                continue
            (by_user if is_given else by_default)[row.ours] = value
            origins[row.ours] = f"{prefix}{names[row.name]}" if is_given else f"default of {dialect.title}"
    for rule, rows in rules.items():
        given_rows = [row for row in rows if row.name in values]
        try:
            found = rule(merged)
        except UserError as error:
            problems.append(str(error))
            continue
        where = f"{prefix}{', '.join(names[row.name] for row in given_rows)}"
        for key, value in found.items():
            (by_user if given_rows else by_default)[key] = value
            origins[key] = where if given_rows else f"default of {dialect.title}"
    return by_default | by_user, origins
