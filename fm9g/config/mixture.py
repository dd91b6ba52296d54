"""The datasets of a run: the entries of `dataset_configs/*.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fm9g.config import foreign
from fm9g.config.fields import did_you_mean, option
from fm9g.config.load import ConfigSource, Resolved, resolve_sources
from fm9g.errors import UserError
from fm9g.io.json_file import read_json
from fm9g.path_kind import MIXTURE, check_kind

LOSS_MODES = ["assistant", "last", "all"]
TURNS = ["auto", "split"]
# Names of chat templates: the built-in ones, the tokenizer's own, and none.
TEMPLATE_FOLDER = Path(__file__).parents[1] / "data" / "encode" / "templates"
BUILTIN_TEMPLATES = tuple(sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.jinja")))
TOKENIZER_TEMPLATE, NO_TEMPLATE = "tokenizer", "none"
DESCRIPTIVE = "descriptive; it has no effect"


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture."""

    FOREIGN_KEYS: ClassVar[dict[str, str]] = foreign.DATASET

    task_name: str = option(help="unique name of the dataset, under which its loss is reported", minLength=1)
    path: str = option(
        help="folder of an indexed dataset, relative to this JSON file or else to the current folder",
        minLength=1,
    )
    dataset_name: str = option("", help=DESCRIPTIVE)
    abs_weight: float | None = option(
        None,
        help="share of the dataset in the tokens of a run, relative to those of the others; give it to all "
        "datasets or to none",
        minimum=0,
    )
    weight: float = option(1.0, help="without abs_weight: the share is weight times the size in bytes", minimum=0)
    transforms: str | None = option(
        None,
        help="Python file with the function transform(data, num_sample, r), relative to this JSON file; empty: none",
    )
    transform_timeout: float = option(
        60.0, help="maximum number of seconds per record for transforms; 0: no limit", minimum=0
    )
    allow_repeat: bool = option(
        True, help="start again in a new order when all records are used; false: leave the mixture"
    )
    nlines: int | None = option(None, help="number of records; a wrong number is reported", minimum=0)
    ave_tokens_per_line: float | None = option(None, help="average number of tokens per record", exclusiveMinimum=0)
    avg_tokens: float | None = option(None, help="another name of ave_tokens_per_line", exclusiveMinimum=0)
    ave_tokens: float | None = option(None, help="another name of ave_tokens_per_line", exclusiveMinimum=0)
    total_tokens: float | None = option(None, help=f"number of tokens in billions; {DESCRIPTIVE}", minimum=0)
    chat_template: str = option(
        "",
        aliases=("template",),
        help="chat template: a built-in name (docs/data.md lists them), tokenizer (the tokenizer's own), a "
        "file, or none; empty: as the run",
    )
    train_on: str = option(
        "",
        aliases=("loss",),
        help="which text of a conversation has a loss: assistant, last or all; empty: as the run",
        enum=["", *LOSS_MODES],
    )
    turns: str = option(
        "", help="how a conversation becomes samples: auto or split; empty: as the run", enum=["", *TURNS]
    )
    oversize_rule: str = option(
        "segment",
        help="treatment of a record longer than max_length: drop it; keep its head; split its text into "
        "segments; or keep it whole in a row of batch_size * max_length tokens",
        enum=["drop", "head", "segment", "whole"],
    )
    incontext_weight: list[float] = option(
        [1.0],
        help="relative frequencies of num_sample = 0, 1, 2, ..., the number of examples that transforms gets",
        minItems=1,
    )
    max_samples: int = option(0, help="use the first records alone, at most this number; 0: as the run", minimum=0)
    do_compact: bool = option(False, help=DESCRIPTIVE)
    is_long: bool = option(False, help=DESCRIPTIVE)

    @property
    def mean_tokens(self) -> float | None:
        """The configured average number of tokens per record."""
        return self.ave_tokens_per_line or self.avg_tokens or self.ave_tokens

    def __post_init__(self) -> None:
        if not self.task_name.isprintable():
            raise UserError(f"task_name: found {self.task_name!r}, expected printable characters")
        check_template(self.chat_template)
        if sum(self.incontext_weight) <= 0:
            raise UserError("incontext_weight: at least one weight must be above 0")


def load_mixture(path: Path) -> list[DatasetConfig]:
    """Reads a mixture; paths inside come back absolute.

    Raises:
        UserError: names the file, the entry and the key.
    """
    return [item.value for item in resolve_mixture(path)]


def resolve_mixture(path: Path, overrides: dict[str, dict[str, Any]] | None = None) -> list[Resolved[DatasetConfig]]:
    """Does the same as `load_mixture`, and returns the origin of each value as well.

    Args:
        overrides: task name -> `--data.TASK.KEY value` from the command line, as strings.
    """
    overrides = dict(overrides or {})
    check_kind(path, MIXTURE)
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise UserError(f'{path}: expected a list of at least one dataset: [{{"task_name": ..., "path": ...}}]')
    resolved: list[Resolved[DatasetConfig]] = []
    for number, entry in enumerate(content):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: [{number}]: found {entry!r}, expected a JSON object")
        sources = [ConfigSource(str(path), entry)]
        task = str(entry.get("task_name", ""))
        if task in overrides:
            sources.append(ConfigSource(f"command line (--data.{task}.)", overrides.pop(task), text=True))
        item = resolve_sources(DatasetConfig, sources, prefix=f"[{number}].")
        resolved.append(Resolved(_absolute(item.value, path), item.origins))
    tasks = [item.value.task_name for item in resolved]
    for task in tasks:
        if tasks.count(task) > 1:
            raise UserError(f"{path}: task_name {task!r} is used {tasks.count(task)} times; give each dataset its own")
    for task in overrides:
        raise UserError(
            f"--data.{task}.: {path} has no such task_name; it has {', '.join(tasks)}{did_you_mean(task, tasks)}"
        )
    if not any(item.value.abs_weight or (item.value.abs_weight is None and item.value.weight) for item in resolved):
        raise UserError(f"{path}: every weight is 0; nothing to train on")
    given = [item.value.task_name for item in resolved if item.value.abs_weight is not None]
    if given and len(given) < len(resolved):
        without = [task for task in tasks if task not in given]
        raise UserError(f"{path}: abs_weight is missing for {', '.join(without)}; give it to all datasets or to none")
    return resolved


def _absolute(config: DatasetConfig, file: Path) -> DatasetConfig:
    def absolute(path: str) -> str:
        # Paths in published mixtures are relative to the folder in which the run starts.
        candidates = [Path(os.path.realpath(file)).parent / path, Path(path)]
        # Not Path.exists, which fails on a name that is too long.
        existing = [candidate for candidate in candidates if os.path.exists(candidate)]
        existing = existing or [candidate for candidate in candidates if os.path.exists(candidate.parent)]
        return os.path.realpath((existing or candidates)[0])  # Path.resolve() fails on a loop of links

    # The name of a built-in template stays as it is.
    template = absolute(config.chat_template) if is_file_name(config.chat_template) else config.chat_template
    transforms = absolute(config.transforms) if config.transforms else None
    return replace(config, path=absolute(config.path), transforms=transforms, chat_template=template)


def check_template(template: str) -> None:
    """Raises UserError for an unknown name of a template. Files are not checked here, but when they are read."""
    known = [*BUILTIN_TEMPLATES, TOKENIZER_TEMPLATE, NO_TEMPLATE]
    if template and template not in known and not is_file_name(template):
        hint = (
            did_you_mean(template, known) or f"; give a file such as ./{template}.jinja, or one of {', '.join(known)}"
        )
        raise UserError(f"chat_template: {template!r}: no such chat template{hint}")


def is_file_name(template: str) -> bool:
    """Whether a template is given as a file instead of a name."""
    return "/" in template or "." in template
