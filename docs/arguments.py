"""Writes arguments.md: every training key, from the configuration's own lines. `python docs/arguments.py`, or `make docs`.

Where a key acts is found in the source: of each top-level function or class under fm9g/, which attributes it reads of
what is known there to be a TrainConfig.
"""

from __future__ import annotations

import re
from pathlib import Path

from fm9g.config.fields import describe, keys_of, schema_of
from fm9g.config.train import RETIRED, TrainConfig

TARGET = Path(__file__).with_name("arguments.md")
PACKAGE = Path(__file__).resolve().parents[1] / "fm9g"
HOME = PACKAGE / "config" / "train.py"
# What holds a TrainConfig: a parameter of that type, what is assigned from `run.train.value`, and that itself.
_TYPED = re.compile(r"\b(\w+): TrainConfig\b")
_ASSIGNED = re.compile(r"^ *([\w., ]+?) = (.*\btrain\.value\b.*)$", re.MULTILINE)
_VALUE = r"\btrain\.value"
_HEAD = """# Training keys

Every key of `train_configs/*.json` and of `fm9g train --KEY VALUE`. `fm9g config keys` prints them, those of models and
datasets too; `fm9g config show` says which value a run gets and where it is from. [training.md](training.md) says what to do
with them. This page is made by `make docs`.

"Acts in" names the files of `fm9g/` that read the key.

| key | meaning | default | allowed | acts in |
|---|---|---|---|---|
"""
_RETIRED = """
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
        default = f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"
        cells = (
            f"`{key}`",
            field.metadata["help"],
            default if field.default != "" else "empty",
            describe(properties[key]).replace("one of ", ""),
            ", ".join(f"`{place}`" for place in places[key]),
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    retired = [f"| `{key}` | {why} |\n" for key, why in RETIRED.items()]
    return f"{_HEAD}{''.join(rows)}{_RETIRED}{''.join(retired)}"


def find_places() -> dict[str, list[str]]:
    """Key -> the files that read it. Raises LookupError for a key that nothing reads."""
    keys = keys_of(TrainConfig)
    stands_for = _computed(list(keys))
    found: dict[str, set[str]] = {key: set() for key in keys}
    for file in sorted(PACKAGE.rglob("*.py")):
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
    text = HOME.read_text(encoding="utf-8")
    for body in re.split(r"^ {4}(?=def )", text[text.index("class TrainConfig") :], flags=re.MULTILINE)[1:]:
        name = re.match(r"def (\w+)", body)[1]  # type: ignore[index]
        if not name.startswith("__"):
            body = re.split(r"^\S", body, flags=re.MULTILINE)[0]
            attributes[name] = [key for key in keys if re.search(rf"\bself\.{key}\b", body)]
    return attributes


def _read(part: str, text: str) -> set[str]:
    """The attributes that a function or class reads of a TrainConfig. text: of its file."""
    holders = set(_TYPED.findall(part))
    for targets, values in _ASSIGNED.findall(part):
        named, given = targets.split(", "), values.split(", ")
        holders |= {name for name, value in zip(named, given) if value.endswith("train.value")}
    names = "|".join([_VALUE, *(rf"(?<![\w.]){re.escape(holder)}" for holder in sorted(holders))])
    read = set(re.findall(rf"(?:{names})\.(\w+)", part))
    for holder, listed in re.findall(rf"getattr\(({names}), key\) for key in (\w+)", part):  # noqa: B007
        written = re.search(rf"^ *{listed} = (.*?)^(?! *[\"'\]\)])", text, re.MULTILINE | re.DOTALL)
        read |= set(re.findall(r"\"(\w+)\"", written[1])) if written else set()
    return read


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
    print(TARGET)
