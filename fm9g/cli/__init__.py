"""The command line of fm9g. Each command is a thin function over the library.

Imports only what parsing the arguments needs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

from fm9g import __version__
from fm9g.cli.ckpt import add_ckpt_commands
from fm9g.cli.convert import add_convert_commands
from fm9g.cli.data import add_data_commands
from fm9g.cli.infer import add_infer_commands, split_foreign_words
from fm9g.cli.init import add_init_command
from fm9g.cli.lora import add_lora_commands
from fm9g.cli.report import add_report_commands
from fm9g.cli.run import add_run_commands
from fm9g.errors import UserError
from fm9g.io.inputs import protect_inputs
from fm9g.io.open_files import is_too_many_open_files, raise_open_file_limit, too_many_open_files
from fm9g.io.utf8 import ensure_utf8_mode
from fm9g.log import log_to_console
from fm9g.openmp import limit_spin_wait
from fm9g.out_of_memory import TRAINING_OOM_ADVICE, oom_as_user_error
from fm9g.printable import printable_output

_MEMORY_ADVICE = {  # how a command needs less memory
    "train": TRAINING_OOM_ADVICE,
    "data": "give fewer --workers, end other programs, or raise the limit (ulimit -v)",
    "generate": "lower max_new_tokens or batch_size, give --quantization nf4, or raise the limit (ulimit -v)",
    "chat": "lower max_new_tokens, give --quantization nf4, or raise the limit (ulimit -v)",
    "serve": "lower max_num_seqs or max_model_len, give --quantization nf4, or raise the limit (ulimit -v)",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a mistake of the user, 130 if interrupted."""
    if argv is None:
        ensure_utf8_mode()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # None if it is closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as the process
    for stream in (sys.stdout, sys.stderr):  # characters that a terminal cannot show must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    raise_open_file_limit()
    limit_spin_wait()
    with printable_output(), log_to_console():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.accepts_overrides:
        parser.error(f"unknown arguments: {' '.join(rest)} (see fm9g {options.command} --help)")
    try:
        if with_nul := [word for word in argv if "\0" in word]:
            raise UserError(f"{with_nul[0]}: contains a NUL character, which is not possible in a path or an argument")
        options.rest = rest
        with (
            protect_inputs(),
            oom_as_user_error(
                _MEMORY_ADVICE.get(options.command, "end other programs, or raise the limit (ulimit -v)")
            ),
        ):
            return options.run(options) or 0
    except UserError as error:
        print(f"fm9g: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "fm9g":
            raise
        print(
            f"fm9g: the package {error.name} is missing from {sys.executable}; in the checkout of fm9g, "
            "`pip install -c constraints.txt -e .` installs what it needs",
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # one that no package expected; the message of the system names the file
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as in `fm9g ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        target = error.filename or "input or output"
        known = (
            too_many_open_files(target)
            if is_too_many_open_files(error)
            else UserError(f"{target}: {error.strerror or error}")
        )
        print(f"fm9g: {known}", file=sys.stderr)
        return 2
    except ValueError as error:
        if "embedded null" not in str(error):  # the message of Python for such a path
            raise
        print(
            "fm9g: a path in an input file contains a NUL character, which is not possible in a path", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("fm9g: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Treats `--some-option` and `--some_option` alike. Refuses an option that is given twice, since one value would be
    lost, and an empty path: Python takes it for the current folder, but usually a shell variable is not set.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.register("type", Path, _path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = {option.replace("-", "_"): option for option in self._option_string_actions if option[:2] == "--"}
        args = [_with_known_spelling(word, known) for word in (sys.argv[1:] if args is None else args)]
        if (own := self.get_default("own_words")) and "--from" in args:
            # Which word is a value, and of which argument, the other tool says.
            args, foreign = split_foreign_words(args, own)
            return super().parse_known_args(args, namespace)[0], foreign
        words = [word.partition("=")[0] for word in args]
        for action in dict.fromkeys(self._option_string_actions.values()):
            given = [word for word in words if word in action.option_strings]
            if action.nargs != 0 and len(given) > 1 and not isinstance(action, argparse._AppendAction):
                twice = f"argument {given[0]}: is given twice; keep one of them"
                same = f"{given[0]} and {given[1]} are both given; they are the same, keep one of them"
                self.error(twice if given[0] == given[1] else same)
        return super().parse_known_args(args, namespace)


def _with_known_spelling(word: str, known: dict[str, str]) -> str:
    """Spells an option as the parser does. known: option with underscores -> spelling of the parser."""
    name, equals, value = word.partition("=")
    return known.get(name.replace("-", "_"), name) + equals + value if name[:2] == "--" else word


def _path(word: str) -> Path:
    if not word:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of the shell not set?")
    return Path(word)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser("fm9g", description="Pretrain and finetune the 9G language models.")
    parser.add_argument("--version", action="version", version=f"fm9g {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="VERB")

    def subcommand(
        name: str, run: Any, help: str, parent: Any = subparsers, accepts_overrides: bool = False
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = parent.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run, accepts_overrides=accepts_overrides)
        return sub

    def group(name: str, help: str) -> Any:
        sub = subparsers.add_parser(name, help=help, description=help)
        return sub.add_subparsers(dest=f"{name}_command", required=True, metavar="VERB")

    quick = subcommand(
        "quickstart", _quickstart, "try everything once on this machine: text, index, training, export, generation"
    )
    quick.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder for all results (default: %(default)s)"
    )
    quick.add_argument("--steps", type=int, default=200, help="number of optimizer steps (default: %(default)s)")
    quick.add_argument("--overwrite", action="store_true", help="replace --out if it is not empty")

    add_init_command(subcommand)
    add_run_commands(subcommand, group)
    add_report_commands(subcommand)
    add_ckpt_commands(subcommand, group)
    add_data_commands(subcommand, group)

    add_convert_commands(subcommand)
    add_lora_commands(subcommand, group)

    add_infer_commands(subcommand)
    return parser


def _quickstart(options: argparse.Namespace) -> None:
    from fm9g.quickstart import quickstart

    quickstart(options.out, options.steps, options.overwrite)
