"""The datasets of a run: the entries of `dataset_configs/*.json`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fm9g.config import foreign
from fm9g.config.fields import did_you_mean, option
from fm9g.config.load import ConfigSource, Resolved, resolve_sources
from fm9g.config.registry import registered_names
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config
from fm9g.path_kind import MIXTURE, check_kind

LOSS_MODES = ["assistant", "last", "all"]
TURNS = ["auto", "split"]
OVERSIZE_RULES = ["segment", "head", "tail", "drop", "whole"]  # the first is the default
# Names of chat templates: the built-in ones, the tokenizer's own, and none.
TEMPLATE_FOLDER = Path(__file__).parents[1] / "data" / "encode" / "templates"
BUILTIN_TEMPLATES = tuple(sorted(file.stem for file in TEMPLATE_FOLDER.glob("*.jinja")))
TOKENIZER_TEMPLATE, NO_TEMPLATE = "tokenizer", "none"
DESCRIPTIVE = "descriptive; it has no effect"
_WEIGHT = 1.0  # default of weight


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
    weight: float = option(_WEIGHT, help="without abs_weight: the share is weight times the size in bytes", minimum=0)
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
    system: str = option("", help="system message of conversations and pairs that have none; empty: as the run")
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
        "",
        help="treatment of a record longer than max_length: drop it; keep its head or its tail; split its text into "
        "segments; or keep it whole in a row of batch_size * max_length tokens; empty: as the run",
        enum=["", *OVERSIZE_RULES],
    )
    incontext_weight: list[float] = option(
        [1.0],
        help="relative frequencies of num_sample = 0, 1, 2, ..., the number of examples that transforms gets",
        minItems=1,
    )
    max_samples: int = option(0, help="use the first records alone, at most this number; 0: as the run", minimum=0)
    sample: int = option(
        0,
        help="use this number of records, drawn at random; more than there are repeat them; 0: all",
        minimum=0,
    )
    sample_skip: int = option(
        0,
        help="leave out the records that a sample of this number draws, with the same sample_seed: to evaluate on "
        "them, say; 0: none",
        minimum=0,
    )
    sample_seed: int = option(42, help="random seed of sample and sample_skip", minimum=0, maximum=2**32 - 1)
    do_compact: bool = option(False, help=DESCRIPTIVE)
    is_long: bool = option(False, help=DESCRIPTIVE)

    @property
    def rule_for_long_records(self) -> str:
        """oversize_rule, or its default."""
        return self.oversize_rule or OVERSIZE_RULES[0]

    @property
    def mean_tokens(self) -> float | None:
        """The configured average number of tokens per record."""
        return self.ave_tokens_per_line or self.avg_tokens or self.ave_tokens

    def __post_init__(self) -> None:
        if not self.task_name.isprintable():
            raise UserError(f"task_name: found {self.task_name!r}, expected printable characters")
        check_template(self.chat_template)
        if self.abs_weight is not None and self.weight != _WEIGHT:
            raise UserError(f"{self.task_name}: abs_weight and weight are both given; keep one of them")
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
    content = read_config(path)
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
    check_mixture([item.value for item in resolved], overrides, str(path))
    return resolved


def check_mixture(datasets: list[DatasetConfig], unused_overrides: Iterable[str], where: str) -> None:
    """Raises UserError for datasets that do not go together.

    Args:
        unused_overrides: task names of overrides that no dataset took.
        where: the file of the mixture, or what messages call it.
    """
    tasks = [dataset.task_name for dataset in datasets]
    for task in tasks:
        if tasks.count(task) > 1:
            raise UserError(f"{where}: task_name {task!r} is used {tasks.count(task)} times; give each dataset its own")
    for task in unused_overrides:
        raise UserError(
            f"--data.{task}.: {where} has no such task_name; it has {', '.join(tasks)}{did_you_mean(task, tasks)}"
        )
    if not any(dataset.abs_weight or (dataset.abs_weight is None and dataset.weight) for dataset in datasets):
        raise UserError(f"{where}: every weight is 0; nothing to train on")
    without = [dataset.task_name for dataset in datasets if dataset.abs_weight is None]
    if 0 < len(without) < len(datasets):
        raise UserError(f"{where}: abs_weight is missing for {', '.join(without)}; give it to all datasets or to none")


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
        registered = registered_names("templates")
        if template in registered:
            return
        known += registered
        hint = (
            did_you_mean(template, known) or f"; give a file such as ./{template}.jinja, or one of {', '.join(known)}"
        )
        raise UserError(f"chat_template: {template!r}: no such chat template{hint}")


def is_file_name(template: str) -> bool:
    """Whether a template is given as a file instead of a name."""
    return "/" in template or "." in template
