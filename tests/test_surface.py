"""What users type: every command, option and key. A line that goes is a promise that is broken.

`python tests/test_surface.py` writes the list anew, which is right for what is added. Whoever renames something keeps
the old name working (aliases of fm9g.config.fields.option, deprecated keys): then its line stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fm9g.cli import build_parser
from fm9g.config.adapter import AdapterConfig
from fm9g.config.fields import aliases_of, keys_of
from fm9g.config.mixture import DatasetConfig
from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig

FROZEN = Path(__file__).with_name("surface.txt")
KINDS = {"train": TrainConfig, "model": ModelConfig, "dataset": DatasetConfig, "adapter": AdapterConfig}


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options_of(sub)
        elif not isinstance(action, argparse._HelpAction):
            yield from (f"{parser.prog} {name}" for name in action.option_strings or [action.dest])


def surface() -> list[str]:
    """A line for each command with an option or argument of it, and for each key of a configuration file."""
    keys = [f"{kind} key {key}" for kind, cls in KINDS.items() for key in [*keys_of(cls), *aliases_of(cls)]]
    return sorted({*options_of(build_parser()), *keys})


def test_what_users_type_is_what_it_was() -> None:
    frozen = FROZEN.read_text(encoding="utf-8").splitlines()
    gone = sorted(set(frozen) - set(surface()))
    assert not gone, "users type these; keep the old names working, then run `python tests/test_surface.py`"
    assert sorted(set(surface()) - set(frozen)) == [], "new: run `python tests/test_surface.py`"


if __name__ == "__main__":
    FROZEN.write_text("\n".join(surface()) + "\n", encoding="utf-8")
