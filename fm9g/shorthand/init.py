"""A run file to start from: five answers, the keys that they set, and the keys that are worth knowing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fm9g.config.fields import keys_of, parse_value
from fm9g.config.run import RunConfig
from fm9g.config.train import METHODS, TrainConfig
from fm9g.errors import UserError
from fm9g.shorthand.data_entry import locate, parse_entries
from fm9g.shorthand.model import describe_model

# Keys that the file has as comments, with the values that the run gets without them.
_FURTHER = (
    "lr",
    "epochs",
    "max_length",
    "batch_size",
    "gradient_accumulation_steps",
    "packing",
    "chat_template",
    "system",
    "val_split",
    "eval_iters",
    "save_iters",
    "save_total_limit",
    "activation_checkpoint",
    "report_to",
    "output_dir",
    "seed",
)
_ADAPTER_KEYS = ("lora_layer", "lora_r", "lora_alpha")
_WIDTH = 100  # of a comment


@dataclass(frozen=True)
class Question:
    """What is asked for a key.

    Args:
        check: raises UserError for an answer that cannot be meant.
    """

    key: str
    text: str
    default: str
    check: Callable[[str], Any]


def _check_model(text: str) -> None:
    describe_model(text)


def _check_data(text: str) -> None:
    for entry in parse_entries(text, "data"):
        locate(entry)


def _check_method(text: str) -> None:
    if text not in METHODS[1:]:
        raise UserError(f"method: found {text!r}, expected one of {', '.join(METHODS[1:])}")


def _check_name(text: str) -> None:
    if not text or "/" in text or text in (".", ".."):
        raise UserError(f"model_unique: found {text!r}, expected a plain name: it is part of the names of folders")


def _check_gpus(text: str) -> None:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 1024):
        raise UserError(f"n_gpus: found {text!r}, expected a number of processes from 1 to 1024")


QUESTIONS = (
    Question("model", "model: a Hugging Face folder, a checkpoint, a .pt file or a size", "", _check_model),
    Question("data", "data: files, folders or names, several with commas", "", _check_data),
    Question("method", f"method: {', '.join(METHODS[1:])}", "lora", _check_method),
    Question("model_unique", "name of the run", "first", _check_name),
    Question("n_gpus", "processes on this machine, one per GPU", "1", _check_gpus),
)


def ask(given: Mapping[str, str], read: Callable[[str], str], show: Callable[[str], None]) -> dict[str, str]:
    """The answers to all questions. A wrong one is asked again.

    Args:
        given: key -> answer, which is not asked.
        read: shows a prompt and reads a line.
        show: shows what is wrong with an answer.
    """
    answers = dict(given)
    for question in QUESTIONS:
        while question.key not in answers:
            default = f" [{question.default}]" if question.default else ""
            text = read(f"{question.text}{default}: ").strip() or question.default
            try:
                question.check(text)
            except UserError as error:
                show(str(error))
            else:
                answers[question.key] = text
    return answers


def complete(given: Mapping[str, str]) -> dict[str, str]:
    """The answers without asking: defaults for those that are not given. Raises UserError if one has no default."""
    missing = [f"--{question.key}" for question in QUESTIONS if question.key not in given and not question.default]
    if missing:
        raise UserError(f"give {' and '.join(missing)}; in a terminal, `fm9g init` asks for them")
    answers = {question.key: question.default for question in QUESTIONS} | dict(given)
    for question in QUESTIONS:
        question.check(answers[question.key])
    return answers


def render(answers: Mapping[str, str], run: RunConfig, file: str) -> str:
    """The text of the run file.

    Args:
        answers: key -> value, as the user gave it.
        run: what these answers configure; the values of all other keys are taken from it.
        file: its name, for the command in its first lines.
    """
    fields = keys_of(TrainConfig)
    lines = [f"# fm9g train {file}", f"# fm9g train {file} --KEY VALUE changes a key for one run.", ""]
    for key, text in answers.items():
        value = parse_value(text, fields[key]) if key in fields else text
        lines += [*_comment(key), _line(key, value), ""]
    lines += ["# Further keys, with the values that the run has without them; docs/arguments.md lists all.", ""]
    for key in (*_FURTHER, *(_ADAPTER_KEYS if run.train.lora_layer else ())):
        if key not in answers:
            origin = run.origins["train"][key]
            comment = _comment(key, f" ({origin})" if origin != "default" else "")
            lines += [*comment, f"# {_line(key, getattr(run.train, key))}", ""]
    return "\n".join(lines)


def _line(key: str, value: Any) -> str:
    import yaml

    flow = None if isinstance(value, list) else False  # a list in one line
    text: str = yaml.safe_dump({key: value}, allow_unicode=True, default_flow_style=flow, width=10**9)
    return text.rstrip()


def _comment(key: str, origin: str = "") -> list[str]:
    """What a training key does, as comments."""
    fields = keys_of(TrainConfig)
    help_text = fields[key].metadata["help"] + origin if key in fields else ""
    return textwrap.wrap(help_text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
