"""What a run trains on: the entries of `dataset_configs/*.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fm9g.config import foreign
from fm9g.config.fields import did_you_mean, option
from fm9g.config.load import ConfigSource, Resolved, build, read_json
from fm9g.errors import UserError
from fm9g.io.path_kind import MIXTURE, check_kind

LOSSES = ["assistant", "last", "all"]
TURNS = ["auto", "split"]
# Chat templates that have a name: those that come with fm9g, the tokenizer's own, and no template.
TEMPLATE_FOLDER = Path(__file__).parents[1] / "data" / "encode" / "templates"
BUILT_IN = tuple(sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.jinja")))
TOKENIZER_TEMPLATE, NO_TEMPLATE = "tokenizer", "none"
DESCRIPTIVE = "descriptive; nothing depends on it"


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture."""

    FOREIGN_KEYS: ClassVar[dict[str, str]] = foreign.DATASET

    task_name: str = option(help="unique name; the loss is reported under it", minLength=1)
    path: str = option(
        help="folder of an indexed dataset, relative to this JSON file or, if it is not there, to the current folder",
        minLength=1,
    )
    dataset_name: str = option("", help=DESCRIPTIVE)
    abs_weight: float | None = option(None, help="share of the tokens of a run, relative to the others", minimum=0)
    weight: float = option(1.0, help="without abs_weight: the share is weight times the size in bytes", minimum=0)
    transforms: str | None = option(None, help="Python file with transform(data, num_sample, r), relative to this file")
    transform_timeout: float = option(60.0, help="seconds that transforms may take per record; 0: any", minimum=0)
    allow_repeat: bool = option(True, help="start again, in a new order, when used up; false: leave the mixture")
    nlines: int | None = option(None, help="number of records; a figure that does not match is reported", minimum=0)
    ave_tokens_per_line: float | None = option(None, help="average tokens of a record", exclusiveMinimum=0)
    avg_tokens: float | None = option(None, help="another name of ave_tokens_per_line", exclusiveMinimum=0)
    ave_tokens: float | None = option(None, help="another name of ave_tokens_per_line", exclusiveMinimum=0)
    total_tokens: float | None = option(None, help=f"10^9 tokens; {DESCRIPTIVE}", minimum=0)
    chat_template: str = option(
        "",
        aliases=("template",),
        help="chat template: a built-in one (docs/data.md lists them), tokenizer (its own), a file, or none; default: "
        "the run's",
    )
    train_on: str = option(
        "", aliases=("loss",), help="what is learnt: assistant, last or all; default: the run's", enum=["", *LOSSES]
    )
    turns: str = option("", help="texts of a conversation: auto or split; default: the run's", enum=["", *TURNS])
    oversize_rule: str = option(
        "segment",
        help="of a record longer than max_length: drop it, keep its head, cut text into segments, or keep it whole in "
        "a row of batch_size * max_length",
        enum=["drop", "head", "segment", "whole"],
    )
    incontext_weight: list[float] = option([1.0], help="odds of num_sample being 0, 1, 2, ...", minItems=1)
    max_samples: int = option(
        0, help="use the first records alone, so many; 0: as the run's max_samples says", minimum=0
    )
    do_compact: bool = option(False, help=DESCRIPTIVE)
    is_long: bool = option(False, help=DESCRIPTIVE)

    @property
    def mean_tokens(self) -> float | None:
        """The configured average tokens of a record."""
        return self.ave_tokens_per_line or self.avg_tokens or self.ave_tokens

    def __post_init__(self) -> None:
        if not self.task_name.isprintable():
            raise UserError(f"task_name: found {self.task_name!r}, expected printable characters")
        check_template(self.chat_template)
        if sum(self.incontext_weight) <= 0:
            raise UserError("incontext_weight: at least one weight must be above 0")


def load_mixture(path: Path, overrides: dict[str, dict[str, Any]] | None = None) -> list[Resolved[DatasetConfig]]:
    """Reads a mixture; paths inside come back absolute.

    overrides: task name -> `--data.TASK.KEY value` from the command line, as strings.
    Raises UserError that names the file, the entry and the key.
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
        item = build(DatasetConfig, sources, prefix=f"[{number}].")
        resolved.append(Resolved(_absolute(item.value, path), item.origins))
    tasks = [item.value.task_name for item in resolved]
    for task in tasks:
        if tasks.count(task) > 1:
            raise UserError(f"{path}: task_name {task!r} is used {tasks.count(task)} times; give each its own")
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
        # Published mixtures have paths that are relative to the folder in which the run starts.
        places = [Path(os.path.realpath(file)).parent / path, Path(path)]
        # Not Path.exists, which fails on a name that is too long.
        there = [place for place in places if os.path.exists(place)]
        there = there or [place for place in places if os.path.exists(place.parent)]
        return os.path.realpath((there or places)[0])  # Path.resolve() fails on a loop of links

    # A template's name stands for itself; a file's, for the file.
    template = absolute(config.chat_template) if is_file_name(config.chat_template) else config.chat_template
    transforms = absolute(config.transforms) if config.transforms else None
    return replace(config, path=absolute(config.path), transforms=transforms, chat_template=template)


def check_template(template: str) -> None:
    """Raises UserError for a name that no template has. A file is looked for when it is read."""
    known = [*BUILT_IN, TOKENIZER_TEMPLATE, NO_TEMPLATE]
    if template and template not in known and not is_file_name(template):
        hint = (
            did_you_mean(template, known) or f"; give a file such as ./{template}.jinja, or one of {', '.join(known)}"
        )
        raise UserError(f"chat_template: {template!r}: no such chat template{hint}")


def is_file_name(template: str) -> bool:
    """Whether a template is given as a file rather than by name."""
    return "/" in template or "." in template
