"""The datasets of a run from `data`: entries are found, indexed on first use, divided and sampled.

data ──parse──> entries ──locate──> files ──cache──> indexed datasets ─┬─ val_split ──> train, validation ── samples
                                └─> indexed datasets, mixtures ────────┘
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.config.load import ConfigSource, Resolved, resolve_sources
from fm9g.config.mixture import DatasetConfig, check_mixture, resolve_mixture
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.path_kind import DATASET, kind_of
from fm9g.shorthand.data_cache import DataCache
from fm9g.shorthand.data_entry import DataEntry, LocatedData, locate, parse_entries

if TYPE_CHECKING:
    from fm9g.data.load.record_sample import RecordSample

logger = logging.getLogger(__name__)

Dataset = Resolved[DatasetConfig]
Overrides = dict[str, dict[str, Any]]  # task name -> key -> text


@dataclass(frozen=True)
class RunData:
    """The datasets of a run.

    Args:
        train: to train on.
        validation: to evaluate on.
    """

    train: list[Dataset]
    validation: list[Dataset]


def resolve_data(train: Resolved[TrainConfig], overrides: Overrides, prepare: bool = True) -> RunData:
    """The datasets that data, val_data and val_split name. All processes of a run may call it at once: one indexes.

    Args:
        overrides: of the datasets to train on, from `--data.TASK.KEY value`.
        prepare: index files that are not in the cache; False: write nothing, and say which they are. Their datasets
            then have the path of the file, and neither val_split nor a sample.

    Raises UserError that names the entry.
    """
    config = train.value
    cache = DataCache(config.data_cache_dir)
    training = _resolve_entries("data", config, cache, overrides, prepare)
    validation = _resolve_entries("val_data", config, cache, {}, prepare)
    if config.val_split:
        training, validation = _split(training, config)
    return RunData(
        _draw(training, config.train_sample, "train_sample", config),
        _draw(validation, config.val_sample, "val_sample", config),
    )


def _resolve_entries(
    key: str, config: TrainConfig, cache: DataCache, overrides: Overrides, prepare: bool
) -> list[Dataset]:
    text, rest = getattr(config, key), dict(overrides)
    if not text:
        return []
    entries = [(entry, locate(entry)) for entry in parse_entries(text, key)]
    _check_places(entries, cache, config)
    _check_shares([entry for entry, located in entries if not located.mixture])
    mixtures = {entry.text: _open_mixture(entry, located, rest) for entry, located in entries if located.mixture}
    tasks = {item.value.task_name for items in mixtures.values() for item in items}
    datasets: list[Dataset] = []
    for entry, located in entries:
        if located.mixture:
            datasets += mixtures[entry.text]
        else:
            task = _unused_name(located.task, tasks)
            datasets.append(_open_dataset(entry, located, task, rest.pop(task, {}), config, cache, prepare))
    check_mixture([dataset.value for dataset in datasets], rest, key)
    return datasets


def _check_places(entries: list[tuple[DataEntry, LocatedData]], cache: DataCache, config: TrainConfig) -> None:
    """Raises UserError if the cache or the output of the run lies in a folder that is read as data."""
    for entry, located in entries:
        for path in located.raw.paths if located.raw else ():
            path = path.partition("**")[0] or "." if "**" in path else path
            for key, folder in (("data_cache_dir", str(cache.folder)), ("output_dir", config.output_dir)):
                if _contains(path, folder):
                    raise entry.error(f"contains {key}, {folder}: what is written there would be read; choose another")


def _check_shares(entries: list[DataEntry]) -> None:
    without = [entry for entry in entries if entry.share is None]
    if 0 < len(without) < len(entries):
        texts = ", ".join(entry.text for entry in without)
        raise UserError(f"{entries[0].key}: {texts}: has no share, and others have one; give one to all, or to none")


def _contains(folder: str, path: str) -> bool:
    return os.path.isdir(folder) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _open_mixture(entry: DataEntry, located: LocatedData, overrides: Overrides) -> list[Dataset]:
    """The datasets of a mixture. Takes their overrides out of `overrides`."""
    assert located.mixture
    if entry.sample or entry.share is not None:
        raise entry.error("is a mixture; write sample and abs_weight for its datasets, in the file")
    tasks = [item.value.task_name for item in resolve_mixture(located.mixture)]
    return resolve_mixture(located.mixture, {task: overrides.pop(task) for task in tasks if task in overrides})


def _unused_name(name: str, used: set[str]) -> str:
    """The name, or with a number behind it; it is then used."""
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(used) + 2))
    used.add(unused := next(each for each in numbered if each not in used))
    return unused


def _open_dataset(
    entry: DataEntry,
    located: LocatedData,
    task: str,
    overrides: dict[str, Any],
    config: TrainConfig,
    cache: DataCache,
    prepare: bool,
) -> Dataset:
    if located.dataset:
        folder: str = str(located.dataset)
    else:
        assert located.raw
        found = cache.find_or_build(located.raw) if prepare else cache.find(located.raw, allow_fresh=True)
        folder = os.path.realpath(found or located.raw.paths[0])
        if found is None:
            logger.info(f"data: {entry.name} is not indexed yet; `fm9g train` does it")
    values: dict[str, Any] = {"task_name": task, "path": folder}
    if entry.share is not None:
        values["abs_weight"] = entry.share
    if sample := entry.sample or located.sample:
        values |= {"sample": sample, "sample_seed": config.split_seed}
    sources = [ConfigSource(f"{entry.key} ({entry.text})", values)]
    if overrides:
        sources.append(ConfigSource(f"command line (--data.{task}.)", overrides, text=True))
    return resolve_sources(DatasetConfig, sources, prefix=f"{entry.key}.{task}.")


# Parts of datasets


def _split(datasets: list[Dataset], config: TrainConfig) -> tuple[list[Dataset], list[Dataset]]:
    """Divides each dataset in the share val_split, rounded down but at least a record, and the rest.

    The share is of the different records; those that a sample repeats are trained on.
    """
    training, validation = [], []
    for dataset in (_with_seed(dataset, config) for dataset in datasets):
        value, stored = dataset.value, _num_stored(dataset)
        if stored is None:
            training.append(dataset)
            continue
        sample = _sample_of(value)
        size = sample.size(stored)
        unique = min(size, stored - sample.skip)
        if unique < 2:
            raise UserError(f"val_split: {value.task_name} has {unique} record; it cannot be divided in two")
        count = max(int(unique * config.val_split), 1)
        rest = size - max(int(size * config.val_split), 1) if sample.count else 0
        origin = f"val_split ({config.val_split:g})"
        training.append(dataset.with_values({"sample": rest, "sample_skip": sample.skip + count}, origin))
        validation.append(dataset.with_values({"sample": count}, origin))
    return training, validation


def _draw(datasets: list[Dataset], count: int, key: str, config: TrainConfig) -> list[Dataset]:
    """Draws `count` records from all datasets, in proportion to their sizes; 0: all."""
    stored = [_num_stored(dataset) for dataset in datasets] if count else []
    sizes = [_sample_of(dataset.value).size(number) for dataset, number in zip(datasets, stored) if number is not None]
    if not sizes or len(sizes) < len(datasets):
        return datasets
    if count >= sum(sizes):
        logger.info(f"{key} {count}: the data has {sum(sizes)} records; all are used")
        return datasets
    counts = _apportion(count, sizes)
    if dropped := [dataset.value.task_name for dataset, number in zip(datasets, counts) if not number]:
        logger.warning(f"{key} {count}: draws no record of {', '.join(dropped)}")
    return [
        _with_seed(dataset, config).with_values({"sample": number}, f"{key} ({count})")
        for dataset, number in zip(datasets, counts)
        if number
    ]


def _apportion(count: int, sizes: list[int]) -> list[int]:
    """Divides `count`, at most the sum of the sizes, in proportion to them: the largest remainders are rounded up."""
    total = sum(sizes)
    counts = [count * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda number: (-(count * sizes[number] % total), number))
    for number in by_remainder[: count - sum(counts)]:
        counts[number] += 1
    return counts


def _with_seed(dataset: Dataset, config: TrainConfig) -> Dataset:
    """The dataset with split_seed, unless it has a seed of its own."""
    if dataset.origins["sample_seed"] != "default":
        return dataset
    return dataset.with_values({"sample_seed": config.split_seed}, "split_seed")


def _sample_of(config: DatasetConfig) -> RecordSample:
    from fm9g.data.load.record_sample import RecordSample  # here, since it imports numpy

    return RecordSample(config.sample, config.sample_skip, config.sample_seed)


def _num_stored(dataset: Dataset) -> int | None:
    """Number of records of an indexed dataset; None: it is a file that is not indexed yet."""
    from fm9g.data.load.indexed_dataset import IndexedDataset

    folder = Path(dataset.value.path)
    return IndexedDataset(folder).num_stored if kind_of(folder) == DATASET else None
