"""The command `fm9g`: its verbs, each a thin function over the library.

Only what argument parsing needs is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

from fm9g import __version__
from fm9g.cli.ckpt import add_ckpt_verbs
from fm9g.cli.convert import add_convert_verb
from fm9g.cli.data import add_data_verbs
from fm9g.cli.lora import add_lora_verbs
from fm9g.cli.report import add_report_verbs
from fm9g.cli.run import add_run_verbs
from fm9g.errors import UserError
from fm9g.files import allow_many_open, is_too_many_open, too_many_open
from fm9g.inputs import keep_inputs
from fm9g.log import log_to_console
from fm9g.memory import TRAINING_ADVICE, memory_as_user_error
from fm9g.printable import as_is, printable_output
from fm9g.threads import spin_briefly
from fm9g.utf8 import use_utf8

_LIGHTER = {  # what makes a verb take less memory
    "train": TRAINING_ADVICE,
    "data": "give fewer --workers, end other programs, or raise the limit (ulimit -v)",
    "generate": "lower max_new_tokens, give a smaller model, or raise the limit (ulimit -v)",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    if argv is None:
        use_utf8()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # a closed one is none
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as the process
    for stream in (sys.stdout, sys.stderr):  # whatever a terminal cannot show must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    allow_many_open()
    spin_briefly()
    with printable_output(), log_to_console():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.takes_keys:
        parser.error(f"unknown arguments: {' '.join(rest)} (see fm9g {options.verb} --help)")
    try:
        if odd := [word for word in argv if "\0" in word]:
            raise UserError(f"{odd[0]}: holds a NUL character, which no path and no text on a command line has")
        options.rest = rest
        with (
            keep_inputs(),
            memory_as_user_error(_LIGHTER.get(options.verb, "end other programs, or raise the limit (ulimit -v)")),
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
    except OSError as error:  # what no room expected: the system's own words name the file
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as in `fm9g ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        target = error.filename or "input or output"
        known = too_many_open(target) if is_too_many_open(error) else UserError(f"{target}: {error.strerror or error}")
        print(f"fm9g: {known}", file=sys.stderr)
        return 2
    except ValueError as error:
        if "embedded null" not in str(error):  # what Python says of such a path
            raise
        print("fm9g: a path in a file that was read holds a NUL character, which no path has", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fm9g: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Refuses an option that is given twice, of which one would be lost, and an empty path, which is the current
    folder to Python, and mostly a variable of the shell that is not set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.register("type", Path, _path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [word.partition("=")[0] for word in args or ()]
        for option, action in self._option_string_actions.items():
            if action.nargs != 0 and words.count(option) > 1:
                self.error(f"argument {option}: is given twice; keep one of them")
        return super().parse_known_args(args, namespace)


def _path(word: str) -> Path:
    if not word:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of the shell not set?")
    return Path(word)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("fm9g", description="Pretrain and finetune the 9G language models.")
    parser.add_argument("--version", action="version", version=f"fm9g {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, help: str, under: Any = verbs, takes_keys: bool = False) -> argparse.ArgumentParser:
        sub = under.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run, takes_keys=takes_keys)
        return sub

    def group(name: str, help: str) -> Any:
        sub = verbs.add_parser(name, help=help, description=help)
        return sub.add_subparsers(dest=f"{name}_verb", required=True, metavar="VERB")

    quick = verb("quickstart", _quickstart, "the whole path on this machine: text, index, training, export, generation")
    quick.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for all that is made (%(default)s)")
    quick.add_argument("--steps", type=int, default=200, help="optimizer steps (%(default)s)")
    quick.add_argument("--overwrite", action="store_true", help="replace --out if it holds something")

    add_run_verbs(verb, group)
    add_report_verbs(verb)
    add_ckpt_verbs(verb, group)
    add_data_verbs(verb, group)

    add_convert_verb(verb)
    add_lora_verbs(verb, group)

    generate = verb("generate", _generate, "continue a prompt with the model of a Hugging Face folder")
    generate.add_argument("folder", type=Path, help="a Hugging Face folder")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the folder's chat template")
    generate.add_argument("--system", default="", help="with --chat: the system message")
    for option, kind, default, meaning in (
        ("max_new_tokens", int, 100, "longest continuation"),
        ("temperature", float, 0.0, "0: always the likeliest token"),
        ("top_p", float, 1.0, "sample from the likeliest tokens that make up this share"),
        ("repetition_penalty", float, 1.0, "above 1: what was said becomes less likely"),
        ("seed", int, 1234, "of the sampling"),
    ):
        generate.add_argument(f"--{option}", type=kind, default=default, help=f"{meaning} (default: {default})")
    return parser


def _quickstart(options: argparse.Namespace) -> None:
    from fm9g.quickstart import quickstart

    quickstart(options.out, options.steps, options.overwrite)


def _generate(options: argparse.Namespace) -> None:
    from fm9g.infer.generate import generate

    settings = {
        key: getattr(options, key)
        for key in ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed", "chat", "system")
    }
    begun = False
    out = sys.stdout if as_is(sys.stdout).isatty() else as_is(sys.stdout)  # a file or a pipe gets the text itself

    def show(text: str) -> None:
        nonlocal begun
        print(text if begun or options.chat else options.prompt, end="", flush=True, file=out)
        begun = True

    generate(options.folder, options.prompt, on_text=show, **settings)
    print()
