"""Writes arguments.md: every training key, from the configuration itself. `python docs/arguments.py`, or `make docs`.

Where a key acts is found in the source: of each top-level function or class under fm9g/, which attributes it reads of
what is known there to be a TrainConfig.
"""

from __future__ import annotations

import re
from dataclasses import MISSING
from pathlib import Path

from fm9g.config.fields import describe, keys_of, schema_of
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig

TARGET = Path(__file__).with_name("arguments.md")
PACKAGE = Path(__file__).resolve().parents[1] / "fm9g"
HOME = PACKAGE / "config" / "train.py"
RULES = PACKAGE / "config" / "train_rules.py"  # checks keys, which is not what they are for
# What holds a TrainConfig: a parameter of that type, the result of `build` or `resolve_sources`, `run.train`, and what
# one of these is assigned to.
_TYPED = re.compile(r"\b(\w+): TrainConfig\b")
_BUILT = re.compile(r"\b(\w+) = build\(\s*TrainConfig\b")
_RESOLVED = re.compile(r"\b(\w+) = resolve_sources\(\s*TrainConfig\b")
_ASSIGNED = re.compile(r"^ *([\w., ]+?) = (.+)$", re.MULTILINE)
_LISTED = re.compile(r"\bfor key in (?:\(([^)]*)\)|(\w+))")
_HEAD = """# Training keys

Every key of `train_configs/*.json` and of `fm9g train --KEY VALUE`; `--some-key` and `--some_key` are the same. A key
that is "also called" something is read by that name, too, everywhere. `fm9g config keys` prints them, and those of
models and datasets; `fm9g config show` says which value a run gets, and where from. [training.md](training.md) says
what to do with them. This page is made by `make docs`.

"Acts in" names the files of `fm9g/` that read the key.

| key | meaning | default | allowed | acts in |
|---|---|---|---|---|
"""
_DEPRECATED = """
## Names of the guide that have no meaning any more

They are accepted, change nothing, and a run that is given one says so.

| name | instead |
|---|---|
"""


def table() -> str:
    """The page."""
    properties, places = schema_of(TrainConfig)["properties"], find_places()
    rows = []
    for key, field in keys_of(TrainConfig).items():
        plain = field.default_factory() if field.default is MISSING else field.default
        default = f"`{str(plain).lower() if isinstance(plain, bool) else plain}`"
        cells = (
            f"`{key}`",
            field.metadata["help"] + "".join(f"; also called `{alias}`" for alias in field.metadata["aliases"]),
            default if plain not in ("", []) else "empty",
            describe(properties[key]).removeprefix("one of ") + "; in any case" * field.metadata["case_insensitive"],
            ", ".join(f"`{place}`" for place in places[key]),
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    deprecated = [f"| `{key}` | {why} |\n" for key, why in DEPRECATED_KEYS.items()]
    return f"{_HEAD}{''.join(rows)}{_DEPRECATED}{''.join(deprecated)}"


def find_places() -> dict[str, list[str]]:
    """Key -> the files that read it. Raises LookupError for a key that nothing reads."""
    keys = keys_of(TrainConfig)
    stands_for = _computed(list(keys))
    found: dict[str, set[str]] = {key: set() for key in keys}
    for file in sorted(set(PACKAGE.rglob("*.py")) - {RULES}):
        text = file.read_text(encoding="utf-8")
        for part in re.split(r"^(?=(?:class|def) )", text, flags=re.MULTILINE):
            if part.startswith("class TrainConfig"):
                continue
            for name in _read(part, text):
                for key in stands_for.get(name, []):
                    found[key].add(str(file.relative_to(PACKAGE)))
    if unread := [key for key, files in found.items() if not files]:
        raise LookupError(f"nothing reads {', '.join(unread)}")
    return {key: sorted(files) for key, files in found.items()}


def _computed(keys: list[str]) -> dict[str, list[str]]:
    """Attributes of a TrainConfig -> the keys behind them: the keys themselves, and what its properties read."""
    attributes = {key: [key] for key in keys}
    text = HOME.read_text(encoding="utf-8").partition("class TrainConfig")[2]
    for name, body in re.findall(r"^    def (\w+)(.*?)(?=^    \S|^\S|\Z)", text, re.MULTILINE | re.DOTALL):
        if not name.startswith("__"):
            attributes[name] = [key for key in keys if re.search(rf"\bself\.{key}\b", body)]
    return attributes


def _read(part: str, text: str) -> set[str]:
    """The attributes that a function or class reads of a TrainConfig. text: of its file."""
    holders = {*_TYPED.findall(part), *_BUILT.findall(part), *(f"{name}.value" for name in _RESOLVED.findall(part))}
    for targets, values in _ASSIGNED.findall(part):
        # From the end: a call among the values may hold commas of its own.
        pairs = zip(reversed(targets.split(", ")), reversed(values.split(", ")))
        holders |= {name for name, value in pairs if value.endswith(("run.train", "train.value")) or value in holders}
    names = "|".join(
        [r"\btrain\.value", r"\b_?run\.train", *(rf"(?<![\w.]){re.escape(holder)}" for holder in sorted(holders))]
    )
    read = set(re.findall(rf"(?:{names})\.(\w+)", part))
    if re.search(rf"getattr\((?:{names}), key\)", part):  # the keys that a list has
        for words, name in _LISTED.findall(part):
            listed = re.search(rf"^{name} = \((.*?)\)", text, re.MULTILINE | re.DOTALL) if name else None
            read |= set(re.findall(r"\"(\w+)\"", listed[1] if listed else words))
    return read


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
    print(TARGET)
