"""Several indexed datasets as one source of samples, each addressed by (dataset, place).

A place is a position in a dataset's endless sequence of epochs; every epoch is a new permutation of its records.
"""

from __future__ import annotations

import importlib.util
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fm9g.config.mixture import DatasetConfig
from fm9g.data.encode import Encoded, encode
from fm9g.data.index import IndexedDataset
from fm9g.data.order import Permutation, mix
from fm9g.data.records import SHOWN
from fm9g.data.tokenizer import load_tokenizer
from fm9g.errors import UserError

Transform = Callable[[dict[str, Any], int, random.Random], dict[str, Any]]

_SHUFFLE, _TRANSFORM, _MEAN = 1, 2, 3  # what a random number is for
_MEAN_RECORDS = 256  # records that an unknown average length is measured on


class Mixture:
    """Opened datasets with their transforms and tokenizer; a pure function from (dataset, place) to samples."""

    def __init__(self, configs: Sequence[DatasetConfig], tokenizer_path: str, max_length: int, seed: int) -> None:
        """Raises UserError for what is missing or cannot be read."""
        self.recipe = (configs, tokenizer_path, max_length, seed)  # what a worker process opens it from
        self.configs, self.max_length, self.seed = list(configs), max_length, seed
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.datasets = [IndexedDataset(config.path) for config in configs]
        self.transforms = [_load_transform(config) for config in configs]
        self._names = [zlib.crc32(config.task_name.encode()) for config in configs]
        self._epochs: dict[int, tuple[int, Permutation]] = {}

    @property
    def sizes(self) -> list[int]:
        return [len(dataset) for dataset in self.datasets]

    def notes(self) -> list[str]:
        """What the configuration says that the data does not bear out, a line each."""
        return [
            f"{config.task_name}: nlines is {config.nlines} in the configuration, {len(dataset)} in {config.path}"
            for config, dataset in zip(self.configs, self.datasets)
            if config.nlines is not None and config.nlines != len(dataset)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What the samples depend on besides the position, as JSON; equal fingerprints give equal samples."""
        return {
            "seed": self.seed,
            "max_length": self.max_length,
            "tokenizer": _checksum(self.tokenizer.files),
            "datasets": [
                {
                    "task_name": config.task_name,
                    "records": len(dataset),
                    "bytes": dataset.nbytes,
                    "transforms": _checksum([Path(config.transforms)] if config.transforms else []),
                    "oversize_rule": config.oversize_rule,
                    "incontext_weight": config.incontext_weight,
                    "allow_repeat": config.allow_repeat,
                }
                for config, dataset in zip(self.configs, self.datasets)
            ],
        }

    def encode(self, dataset: int, place: int) -> Encoded:
        """The samples of the record at a place. Raises UserError that names dataset and line of a bad record."""
        epoch, offset = divmod(place, len(self.datasets[dataset]))
        if self._epochs.get(dataset, (-1,))[0] != epoch:
            size = len(self.datasets[dataset])
            self._epochs[dataset] = epoch, Permutation(size, self.seed, _SHUFFLE, self._names[dataset], epoch)
        return self._encode_record(dataset, self._epochs[dataset][1](offset), place)

    def _encode_record(self, dataset: int, number: int, place: int) -> Encoded:
        config, record = self.configs[dataset], self.datasets[dataset][number]
        transform = self.transforms[dataset]
        if transform is not None:
            source = random.Random(mix(self.seed, _TRANSFORM, self._names[dataset], place))
            weights = config.incontext_weight
            shots = source.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
            where = f"{config.task_name}, line {number + 1} of {config.path}, {config.transforms}"
            try:
                record = transform(record, shots, source)
            except (Exception, SystemExit) as error:
                raise UserError(f"{where}: {type(error).__name__}: {error}") from error
            good = isinstance(record, dict) and all(isinstance(record.get(key, ""), str) for key in ("input", "output"))
            if not good:
                raise UserError(f'{where}: returned {repr(record)[:SHOWN]}, expected {{"input": str, "output": str}}')
        try:
            return encode(record, self.tokenizer, self.max_length, config.oversize_rule)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate is no text
            raise UserError(f"{config.task_name}, line {number + 1} of {config.path}: not encodable: {error}") from None

    def mean_tokens(self) -> list[float]:
        """Average tokens of a sample of each dataset: as configured (at most max_length), else measured.

        The measure is the mean over the samples of the same 256 records in every process.
        """
        means = []
        for number, (config, dataset) in enumerate(zip(self.configs, self.datasets)):
            if config.mean_tokens:
                means.append(min(config.mean_tokens, float(self.max_length)))
                continue
            draw = Permutation(len(dataset), self.seed, _MEAN, self._names[number])
            lines = [draw(i) for i in range(min(_MEAN_RECORDS, len(dataset)))]
            lengths = [len(ids) for line in lines for ids, _ in self._encode_record(number, line, place=line).pieces]
            means.append(sum(lengths) / len(lengths) if lengths else 1.0)
        return means

    def shares(self) -> list[float]:
        """The share of tokens that each dataset is to have: abs_weight, or weight times the size in bytes; sum 1."""
        weights = [
            config.weight * dataset.nbytes if config.abs_weight is None else config.abs_weight
            for config, dataset in zip(self.configs, self.datasets)
        ]
        return [weight / sum(weights) for weight in weights]


def _load_transform(config: DatasetConfig) -> Transform | None:
    if not config.transforms:
        return None
    path = Path(config.transforms)
    where = f"{config.task_name}: transforms: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    spec = importlib.util.spec_from_file_location(f"fm9g_transform_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, "transform", None)):
        raise UserError(f"{where}: it defines no function transform(data, num_sample, r)")
    return module.transform


def _checksum(files: Iterable[Path]) -> str:
    value = 0
    for file in files:
        value = zlib.crc32(file.read_bytes(), value)
    return f"{value:08x}"
