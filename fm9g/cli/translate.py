"""`fm9g config translate`: the arguments of another tool as a run file or a command of fm9g."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

_FORMATS = ("yaml", "command")
_SUFFIXES = {"yaml": (".yaml", ".yml"), "command": (".sh",)}


def add_translate_command(subcommand: Any, parent: Any) -> None:
    """Args: subcommand: a function that adds a command; parent: the group that it belongs to."""
    from fm9g.cli.run import add_run_options

    about = "print a file or arguments of another tool as a run file of fm9g, with the origin of each key"
    parser = subcommand("translate", _translate, about, parent=parent, accepts_overrides=True)
    add_run_options(parser)
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        default=_FORMATS[0],
        help="yaml: a run file; command: an fm9g train command (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=None, metavar="FILE", help="write into a file (.yaml, .sh)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.usage = f"{parser.prog} [-h] [--from TOOL] [FILE] [--format FORMAT] [--output FILE] [--THEIR-ARGUMENT ...]"


def _translate(options: argparse.Namespace) -> None:
    from fm9g.cli.run import run_arguments
    from fm9g.io.atomic import atomic_file
    from fm9g.io.output import check_output_file
    from fm9g.shorthand.load import read_sources

    if options.output:
        check_output_file(options.output, "--output", _SUFFIXES[options.format], options.overwrite)
    found = read_sources(run_arguments(options))
    keys: dict[str, tuple[Any, str]] = {"config": (found.config, "--config")} if found.config else {}
    for source in found.sources:
        keys |= {key: (value, source.origin) for key, value in source.values.items()}
    notes = "".join(
        f"# {' '.join(note.split())}\n" for note in (found.translation.all_notes if found.translation else ())
    )
    text = notes + (_command(keys) if options.format == "command" else _yaml(keys, separated=bool(notes)))
    if not options.output:
        print(text, end="")
        return
    with atomic_file(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{options.output}: start it with: {_start(options)}")


def _start(options: argparse.Namespace) -> str:
    file = shlex.quote(str(options.output))
    return f"bash {file}" if options.format == "command" else f"fm9g train {file}"


def _yaml(keys: dict[str, tuple[Any, str]], separated: bool) -> str:
    """A run file. A comment says where the keys below it are from. separated: an empty line comes first."""
    import yaml

    lines, last = [""] if separated else [], ""
    for key, (value, origin) in keys.items():
        if origin != last:
            lines.append(f"# {' '.join(origin.split())}")
        last = origin
        lines.append(yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=False, width=10**9).rstrip())
    return "\n".join(lines) + "\n"


def _command(keys: dict[str, tuple[Any, str]]) -> str:
    """The same as a command, a key per line."""
    words = [f"--{key} {shlex.quote(text)}" if text else f"--{key}=" for key, text in _texts(keys).items()]
    return " \\\n    ".join(["fm9g train", *words]) + "\n"


def _texts(keys: dict[str, tuple[Any, str]]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, (value, _) in keys.items()}  # fmt: skip
