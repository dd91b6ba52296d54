"""`fm9g config translate`: the arguments of another tool as a run file of fm9g."""

from __future__ import annotations

import argparse
from typing import Any


def add_translate_command(subcommand: Any, parent: Any) -> None:
    """Args: subcommand: a function that adds a command; parent: the group that it belongs to."""
    from fm9g.cli.run import add_run_options

    about = "print a file or arguments of another tool as a run file of fm9g, with the origin of each key"
    add_run_options(subcommand("translate", _translate, about, parent=parent, accepts_overrides=True))


def _translate(options: argparse.Namespace) -> None:
    import yaml

    from fm9g.cli.run import run_arguments
    from fm9g.shorthand.load import read_sources

    name, sources = read_sources(run_arguments(options))
    found = {"config": (name, "--config")} if name else {}
    for source in sources:
        found |= {key: (value, source.origin) for key, value in source.values.items()}
    for key, (value, origin) in found.items():
        text = yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=False, width=10**9).rstrip("\n")
        print(f"# {' '.join(origin.split())}\n{text}")
