"""Several indexed datasets as one source of samples, each addressed by (dataset, place).

A place is a position in a dataset's endless sequence of epochs; every epoch is a new permutation of its records.
"""

from __future__ import annotations

import importlib.util
import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm9g.config.mixture import DatasetConfig
from fm9g.data import cache
from fm9g.data.cache import TokenCache
from fm9g.data.encode import Encoded, Encoder, Texts, cut
from fm9g.data.index import IndexedDataset
from fm9g.data.order import Permutation, mix
from fm9g.data.records import SHOWN
from fm9g.data.shapes import BadRecord
from fm9g.data.template import Rendered, Template, load_template
from fm9g.data.tokenizer import CHAT_TEMPLATE, load_tokenizer
from fm9g.errors import UserError

Transform = Callable[[dict[str, Any], int, random.Random], dict[str, Any]]

_SHUFFLE, _TRANSFORM, _MEAN = 1, 2, 3  # what a random number is for
_MEAN_RECORDS = 256  # records that an unknown average length is measured on
_CACHE_VERSION = 1
_SMALL, _EPOCHS = 4096, 1024  # records of a small dataset, and epochs that are remembered


class Recipe(NamedTuple):
    """What a mixture is opened from, in this process or in a worker."""

    configs: Sequence[DatasetConfig]
    tokenizer_path: str
    max_length: int
    seed: int
    capacity: int
    token_cache: str = ""


class Mixture:
    """Opened datasets with transforms, templates and tokenizer; a pure function from (dataset, place) to samples."""

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        tokenizer_path: str,
        max_length: int,
        seed: int,
        capacity: int = 0,
        token_cache: str = "",
    ) -> None:
        """capacity: tokens of a row, at least max_length and as much by default. token_cache: a folder with the caches
        of the datasets, made by `fill_cache`; those that are not there or stale are not used.

        Raises UserError for what is missing or cannot be read.
        """
        self.configs, self.max_length, self.seed = list(configs), max_length, seed
        self.capacity = capacity or max_length
        assert self.capacity >= max_length  # else a sample might fit into no row
        self.recipe = Recipe(configs, tokenizer_path, max_length, seed, self.capacity, token_cache)
        self.tokenizer = load_tokenizer(tokenizer_path)
        self.datasets = [IndexedDataset(config.path, config.max_samples) for config in configs]
        self.transforms = [_load_transform(config) for config in configs]
        self.encoders = [
            Encoder(
                self.tokenizer,
                load_template(config.template, self.tokenizer) if config.template else self._own_template(),
                config.loss or "assistant",
            )
            for config in configs
        ]
        self.keys = [zlib.crc32(config.task_name.encode()) for config in configs]
        self.drew = [False for _ in configs]  # whether a transform of the dataset used its random numbers
        self._epochs: dict[tuple[int, int], Callable[[np.ndarray], np.ndarray]] = {}
        self.caches: list[TokenCache | None] = [None for _ in configs]
        if token_cache:
            for number in range(len(configs)):
                folder = self.cache_folder(number)
                if cache.stale(folder, self.cache_key(number)) == []:
                    self.caches[number] = TokenCache(folder, len(self.datasets[number]))

    def numbers(self, dataset: int, places: Sequence[int]) -> np.ndarray:
        """(n,) the records at places of a dataset's sequence of epochs."""
        size = len(self.datasets[dataset])
        epochs, offsets = np.divmod(np.array(places, np.int64), size)
        numbers = np.empty_like(offsets)
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            numbers[here] = self._order(dataset, epoch)(offsets[here])
        return numbers

    def _order(self, dataset: int, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """The permutation of an epoch; of a small dataset, which makes many of them, all of it at once."""
        key = dataset, epoch
        if key not in self._epochs:
            if len(self._epochs) >= _EPOCHS:
                self._epochs.clear()
            size = len(self.datasets[dataset])
            permutation = Permutation(size, self.seed, _SHUFFLE, self.keys[dataset], epoch)
            self._epochs[key] = permutation(np.arange(size)).__getitem__ if size <= _SMALL else permutation
        return self._epochs[key]

    def encode(self, dataset: int, places: Sequence[int]) -> list[Encoded]:
        """The samples of the records at places. Raises UserError that names dataset and line of a bad record."""
        numbers, cached = self.numbers(dataset, places), self.caches[dataset]
        tokens = cached.read(numbers) if cached else self.tokens(dataset, numbers.tolist(), places)
        return [self.cut(dataset, record) for record in tokens]

    def cut(self, dataset: int, tokens: np.ndarray) -> Encoded:
        """The samples that the marked tokens of a record of the dataset give."""
        return cut(tokens, self.max_length, self.configs[dataset].oversize_rule, self.capacity)

    def tokens(self, dataset: int, numbers: Sequence[int], places: Sequence[int]) -> list[np.ndarray]:
        """The marked tokens of records, by number. places: what the random numbers of their transforms depend on."""
        return self.tokens_of([self.texts(dataset, n, place) for n, place in zip(numbers, places)], dataset, numbers)

    def tokens_of(self, texts: list[Texts | Rendered], dataset: int, numbers: Sequence[int]) -> list[np.ndarray]:
        """The marked tokens of the texts of records."""
        try:
            return self.encoders[dataset].tokens(texts)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate is no text
            lines, config = ", ".join(str(number + 1) for number in numbers), self.configs[dataset]
            where = f"{config.task_name}, one of the lines {lines} of {config.path}"
            raise UserError(f"{where}: the text that is made of it cannot be encoded: {error}") from None

    def texts(self, dataset: int, number: int, place: int, with_contents: bool = False) -> Texts | Rendered:
        """What is to be encoded of a record. with_contents: as in Template.render_spans."""
        record = self.datasets[dataset][number]
        config, transform = self.configs[dataset], self.transforms[dataset]
        script = f", {config.transforms}" if transform else ""
        where = f"{config.task_name}, line {number + 1} of {config.path}{script}"
        if transform is not None:
            record = self._transformed(record, transform, dataset, place, where)
        try:
            return self.encoders[dataset].texts(record, with_contents)
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None

    def _transformed(self, record: dict, transform: Transform, dataset: int, place: int, where: str) -> dict[str, Any]:
        source = _Random(mix(self.seed, _TRANSFORM, self.keys[dataset], place))
        weights = self.configs[dataset].incontext_weight
        shots = source.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
        try:
            record = transform(record, shots, source)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
            raise UserError(f'{where}: returned {repr(record)[:SHOWN]}, expected {{"input": str, "output": str}}')
        self.drew[dataset] |= source.drew
        return record

    def _own_template(self) -> Template | None:
        """The template for conversations of a dataset that names none."""
        return load_template("tokenizer", self.tokenizer) if self.tokenizer.chat_template else None

    def files_to_keep(self) -> dict[str, Path | str]:
        """What a trained model needs to be used: the tokenizer's files, and the template that it was trained with.

        File name -> the file, or its text. Of several templates, that of the largest dataset that names one.
        """
        named = [
            (share, encoder.template.text)
            for config, encoder, share in zip(self.configs, self.encoders, self.shares())
            if config.template and encoder.template
        ]
        files: dict[str, Path | str] = {file.name: file for file in self.tokenizer.files}
        return files | ({CHAT_TEMPLATE: max(named)[1]} if named else {})

    def cache_folder(self, dataset: int) -> Path:
        name = re.sub(r"[^\w-]", "_", self.configs[dataset].task_name)
        return Path(self.recipe.token_cache) / f"{name}-{self.keys[dataset]:08x}"

    def cache_key(self, dataset: int) -> dict[str, Any]:
        """What the tokens of a dataset's records depend on, as JSON."""
        records = self.datasets[dataset]
        return {
            "version": _CACHE_VERSION,
            "data": str(records.folder),
            "records": len(records),
            "bytes": records.nbytes,
            "modified": records.modified,
            **self.encoding(dataset),
        }

    def encoding(self, dataset: int) -> dict[str, Any]:
        """What turns a dataset's records into tokens, as JSON."""
        config, encoder = self.configs[dataset], self.encoders[dataset]
        return {
            "tokenizer": _checksum(self.tokenizer.files),
            "transforms": _checksum([Path(config.transforms)] if config.transforms else []),
            "template": f"{zlib.crc32(encoder.template.text.encode()):08x}" if encoder.template else "",
            "loss": encoder.loss,
        }

    def notes(self) -> list[str]:
        """What the configuration says that the data does not bear out, a line each."""
        return [
            f"{config.task_name}: nlines is {config.nlines} in the configuration, {dataset.size} in {config.path}"
            for config, dataset in zip(self.configs, self.datasets)
            if config.nlines is not None and config.nlines != dataset.size
        ]

    def mean_tokens(self) -> list[float]:
        """About how many tokens a sample of each dataset has: as configured (at most max_length), else measured.

        The measure is the mean over the samples of the same 256 records in every process.
        """
        means = []
        for number, config in enumerate(self.configs):
            if config.mean_tokens:
                means.append(min(config.mean_tokens, float(self.max_length)))
                continue
            _, tokens = self._measured(number)
            lengths = [len(piece) - 1 for record in tokens for piece in self.cut(number, record).pieces]
            means.append(sum(lengths) / len(lengths) if lengths else 1.0)
        return means

    def count_tokens(self) -> float:
        """About how many tokens all records together give, once each: measured on the same records as mean_tokens."""
        total = 0.0
        for number, dataset in enumerate(self.datasets):
            drawn, tokens = self._measured(number)
            pieces = (piece for record in tokens for piece in self.cut(number, record).pieces)
            total += sum(len(piece) - 1 for piece in pieces) / len(drawn) * len(dataset)
        return total

    def _measured(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Some records of a dataset, the same in every process, and their marked tokens."""
        size = len(self.datasets[number])
        drawn = Permutation(size, self.seed, _MEAN, self.keys[number])(np.arange(min(_MEAN_RECORDS, size)))
        cached = self.caches[number]
        return drawn, cached.read(drawn) if cached else self.tokens(number, drawn.tolist(), places=drawn.tolist())

    def shares(self) -> list[float]:
        """The share of tokens that each dataset is to have: abs_weight, or weight times the size in bytes; sum 1."""
        weights = [
            config.weight * dataset.nbytes if config.abs_weight is None else config.abs_weight
            for config, dataset in zip(self.configs, self.datasets)
        ]
        weights = [weight / max(weights) for weight in weights]  # so that no sum is too large
        return [weight / sum(weights) for weight in weights]


class _Random(random.Random):
    """Knows whether a number was drawn from it: if not, what was made with it does not depend on it."""

    drew = False

    def random(self) -> float:
        self.drew = True
        return super().random()

    def getrandbits(self, k: int) -> int:
        self.drew = True
        return super().getrandbits(k)


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
