"""Writes dialects.md: every argument of other tools, from the tables. `python docs/dialects.py`, or `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from fm9g.config.dialects.infer import OPTIONS, inference_dialects
from fm9g.config.dialects.infer_tables import FOR_TRAINING
from fm9g.config.dialects.table import UNSET, Dialect, Row
from fm9g.config.dialects.translate import dialects, find_dialect
from fm9g.config.fields import keys_of
from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig

_KEYS = {*keys_of(TrainConfig), *(f"model.{key}" for key in keys_of(ModelConfig))}
_OPTIONS = {"model", "adapters", "output", *(option for options in OPTIONS.values() for option in options)}
TARGET = Path(__file__).with_name("dialects.md")
TESTS = Path(__file__).resolve().parents[1] / "tests"
INFERENCE_ROWS = TESTS / "config" / "test_infer_dialects.py"
EVERY_ROW = TESTS / "test_dialects_table.py"  # gives each argument to the translation and looks what changes
_HEAD = """# Arguments of other tools

What `fm9g train` does with the arguments of other tools. `--from NAME` says which tool is meant; without it, the tool
is recognized by the names. `fm9g config translate` prints a file or a command in our keys. This page is made by
`make docs`.

"Tested by" names files of `tests/`. `test_dialects_table.py` gives every argument to the translation and checks that it
sets a key, says why it has no effect, or is refused; the other files check values.
"""
_INFERENCE_HEAD = """
## Inference

What `fm9g generate`, `fm9g chat`, `fm9g serve` and `fm9g lora merge` do with the arguments that other tools have for
inference. `--from NAME` says which tool is meant. Arguments of the same tool for training have no effect there.
"""


def table() -> str:
    """The page."""
    words = _words_of_tests()
    parts = [_HEAD]
    for dialect in dialects().values():
        parts += [_heading(dialect, dialect.title)]
        parts += [_line(row, _KEYS, _tests_of(dialect, row, words)) for row in dialect.rows]
    parts.append(_INFERENCE_HEAD)
    for dialect in inference_dialects().values():
        parts += [_heading(dialect, f"Inference: {dialect.title}")]
        parts += [_line(row, _OPTIONS, [INFERENCE_ROWS]) for row in dialect.rows if not _is_for_training(dialect, row)]
    return "".join(parts)


def _heading(dialect: Dialect, title: str) -> str:
    return (
        f"\n## {title} {dialect.version}".rstrip()
        + f"\n\n`--from {dialect.name}`\n\n| argument | here | their default | note | tested by |\n"
        + "|---|---|---|---|---|\n"
    )


def _line(row: Row, known: set[str], tests: list[Path]) -> str:
    """The line of an argument. known: keys or options of fm9g."""
    name = ", ".join(f"`{name}`" for name in (row.name, *row.aliases)) + f" ({row.label})" * bool(row.label)
    default = "" if row.default in (UNSET, None, "") else f"`{row.default}`"
    files = ", ".join(f"`{file.relative_to(TESTS)}`" for file in tests)
    cells = (name, _effect(row, known), default, row.note, files)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _is_for_training(dialect: Dialect, row: Row) -> bool:
    """Whether an argument has no effect on inference, and the part on training says all about it."""
    in_training = find_dialect(dialect.name).row_of(row.name)
    return row.ignored == FOR_TRAINING or (in_training is not None and row.ignored == in_training.ignored != "")


def _effect(row: Row, known: set[str]) -> str:
    if row.ignored:
        return f"no effect: {row.ignored}"
    if row.refused:
        accepted = f"; accepted: {', '.join(f'`{value}`' for value in row.harmless)}" if row.harmless else ""
        return f"refused: {row.refused}{accepted}"
    if row.rule:
        about = " ".join((row.rule.__doc__ or "").split("\n\n")[0].split())
        keys = ", ".join(f"`{key}`" for key in sorted(_keys_of_rule(row.rule, known)))
        return f"{keys}: {about}" if keys else about
    return f"`{row.ours}`"


def _keys_of_rule(rule: Any, known: set[str], depth: int = 3) -> set[str]:
    """The known keys that a rule may set: those in its source, in the functions that it calls, and in its tables."""
    if depth == 0:
        return set()
    found: set[str] = set()
    code = rule.__code__
    named = [rule.__globals__.get(name) for name in code.co_names]
    named += [
        getattr(module, name, None) for module in named if isinstance(module, ModuleType) for name in code.co_names
    ]
    for value in [*code.co_consts, *(cell.cell_contents for cell in rule.__closure__ or ()), *named]:
        found |= _keys_of_rule(value, known, depth - 1) if _is_rule(value) else _keys_in(value, known)
    return found - {"val_dataset"}  # the name of an argument there


def _is_rule(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__module__.startswith("fm9g.config.dialects")


def _keys_in(value: Any, known: set[str]) -> set[str]:
    """The known keys among the texts of a constant or a table."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, frozenset)):
        return {key for item in value for key in _keys_in(item, known)}
    return {value} & known if isinstance(value, str) else set()


def _words_of_tests() -> dict[Path, set[str]]:
    """The names that each test of dialects contains, by file."""
    files = [*(TESTS / "config" / "dialects").glob("test_*.py"), TESTS / "shorthand" / "test_dialect_runs.py"]
    return {file: set(re.findall(r"[\w.]+", file.read_text(encoding="utf-8"))) for file in sorted(files)}


def _tests_of(dialect: Dialect, row: Row, words: dict[Path, set[str]]) -> list[Path]:
    """The files that test an argument: those that name it and the dialect, else the one for every row."""
    constant = dialect.name.upper().replace("-", "_").replace("9G", "NINE_G")
    named = [file for file, found in words.items() if constant in found and found & {row.name, *row.aliases}]
    return named or [EVERY_ROW]


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
    print(TARGET)
