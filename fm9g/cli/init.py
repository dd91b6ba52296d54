"""`fm9g init`: asks five questions, writes a run file, and says what the run will cost."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

_SUFFIXES = (".yaml", ".yml")


def add_init_command(subcommand: Any) -> None:
    """subcommand: a function that adds a command to the command line."""
    init = subcommand("init", _init, "write a run file by asking five questions, or from flags", accepts_overrides=True)
    init.add_argument(
        "--output", type=Path, default=Path("run.yaml"), metavar="FILE", help="the run file (default: %(default)s)"
    )
    init.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    init.usage = (
        f"{init.prog} [-h] [--output FILE] [--model M] [--data D] [--method METHOD] [--model_unique NAME] [--n_gpus N]"
    )
    init.epilog = "Also --KEY VALUE, as for `fm9g train`. On a terminal, what is not given is asked."


def _init(options: argparse.Namespace) -> None:
    from fm9g.config.command_line import parse_words, single_values
    from fm9g.io.atomic import atomic_file
    from fm9g.io.output import check_output_file
    from fm9g.plan.command import plan_verdict
    from fm9g.shorthand.init import ask, complete, render
    from fm9g.shorthand.load import RunArguments, load_run

    check_output_file(options.output, "--output", _SUFFIXES, options.overwrite)
    given = single_values(parse_words(options.rest))
    answers = ask(given, input, print) if sys.stdin.isatty() else complete(given)
    arguments = RunArguments(values=answers)
    run = load_run(arguments, complete=False, prepare_data=False)
    text = render(answers, run, str(options.output))
    with atomic_file(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{options.output}: start it with: fm9g train {shlex.quote(str(options.output))}")
    print(plan_verdict(load_run(arguments, complete=False)))
