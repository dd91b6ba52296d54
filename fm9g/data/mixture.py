"""Several indexed datasets as one source of samples, each addressed by (dataset, place).

A place is a position in a dataset's endless sequence of epochs; every epoch is a new permutation of its records.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm9g.config.mixture import NONE, OWN, DatasetConfig
from fm9g.data import cache
from fm9g.data.cache import TokenCache
from fm9g.data.encode import Encoded, Encoder, Texts, cut
from fm9g.data.encoding_limits import UnreadableTextError
from fm9g.data.index import IndexedDataset
from fm9g.data.literal import protect
from fm9g.data.order import Permutation, mix
from fm9g.data.shapes import BadRecord
from fm9g.data.template import Template, load_template
from fm9g.data.tokenizer import CHAT_TEMPLATE, CHAT_TEMPLATES, Tokenizer, load_tokenizer
from fm9g.data.transform import Source, Transform, guarded, load_transform, shown
from fm9g.errors import UserError

_SHUFFLE, _TRANSFORM, _MEAN = 1, 2, 3  # what a random number is for
_MEAN_RECORDS = 256  # records that an unknown average length is measured on
_CACHE_VERSION = 2
_SMALL, _EPOCHS = 4096, 1024  # records of a small dataset, and epochs that are remembered


class Recipe(NamedTuple):
    """What a mixture is opened from, in this process or in a worker. tokenizer: opened, or its path."""

    configs: Sequence[DatasetConfig]
    tokenizer: str | Tokenizer
    max_length: int
    seed: int
    capacity: int
    token_cache: str = ""
    date: str = ""
    with_findings: bool = False


class Mixture:
    """Opened datasets with transforms, templates and tokenizer; a pure function from (dataset, place) to samples."""

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        tokenizer: str | Tokenizer,
        max_length: int,
        seed: int,
        capacity: int = 0,
        token_cache: str = "",
        date: str = "",
        with_findings: bool = False,
    ) -> None:
        """tokenizer: opened, or its path. capacity: tokens of a row, at least max_length and as much by default.
        token_cache: a folder with the caches of the datasets, made by `fill_cache`; those that are not there or stale
        are not used. date: what templates write as today's, YYYY-MM-DD; empty: today. with_findings: what is found in
        records is counted.

        Raises UserError for what is missing or cannot be read.
        """
        self.configs, self.max_length, self.seed = list(configs), max_length, seed
        self.capacity = capacity or max_length
        assert self.capacity >= max_length  # else a sample might fit into no row
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        date = date or datetime.date.today().isoformat()
        # Workers get the opened tokenizer: opening it takes transformers, and seconds.
        self.recipe = Recipe(configs, self.tokenizer, max_length, seed, self.capacity, token_cache, date, with_findings)
        self.with_findings = with_findings
        self.datasets = [_opened(config) for config in configs]
        self.transforms = [_transform(config) for config in configs]
        self.encoders = [self._encoder(config, date) for config in configs]
        templates = [item for encoder in self.encoders for item in (encoder.template, encoder.chat_template) if item]
        self.date = date if any(template.uses_date for template in templates) else ""  # the samples depend on it
        self.keys = [zlib.crc32(config.task_name.encode()) for config in configs]
        self.drew = [False for _ in configs]  # whether a transform of the dataset used its random numbers
        self.findings: list[Counter[str]] = [Counter() for _ in configs]  # what was found in records, see Encoder
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

    def tokens_of(self, texts: list[Texts], dataset: int, numbers: Sequence[int]) -> list[np.ndarray]:
        """The marked tokens of the texts of records."""
        try:
            return self.encoders[dataset].tokens(texts)
        except (TypeError, UnicodeEncodeError, UnreadableTextError) as error:  # a lone surrogate is no text
            lines, config = ", ".join(str(number + 1) for number in numbers), self.configs[dataset]
            where = f"{config.task_name}, one of the lines {lines} of {config.path}"
            raise UserError(f"{where}: the text that is made of it cannot be encoded: {error}") from None

    def texts(self, dataset: int, number: int, place: int, with_contents: bool = False) -> Texts:
        """What is to be encoded of a record. with_contents: as in Encoder.texts."""
        record, texts = self._rendered(dataset, number, place, with_contents)
        if self.with_findings:
            self.findings[dataset].update(self.encoders[dataset].findings(record, texts))
        return texts

    def _rendered(
        self, dataset: int, number: int, place: int, with_contents: bool = False
    ) -> tuple[dict[str, Any], Texts]:
        """A record, as its transform returns it, and its texts."""
        record = self.datasets[dataset][number]
        config, transform = self.configs[dataset], self.transforms[dataset]
        script = f", {config.transforms}" if transform else ""
        where = f"{config.task_name}, line {number + 1} of {config.path}{script}"
        if transform is not None:
            record = self._transformed(record, transform, dataset, place, where)
        try:
            return record, self.encoders[dataset].texts(record, transform is not None, with_contents)
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None

    def _transformed(self, record: dict, transform: Transform, dataset: int, place: int, where: str) -> dict[str, Any]:
        source = Source(mix(self.seed, _TRANSFORM, self.keys[dataset], place))
        weights = self.configs[dataset].incontext_weight
        shots = source.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
        with guarded(where, self.configs[dataset].transform_timeout):
            record = transform(protect(record, self.tokenizer.special_pattern), shots, source)
            if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
                raise UserError(f'{where}: returned {shown(record)}, expected {{"input": str, "output": str}}')
        self.drew[dataset] |= source.drew
        return record

    def _encoder(self, config: DatasetConfig, date: str) -> Encoder:
        template = chat_template = None
        try:
            if config.template not in ("", NONE):
                template = load_template(config.template, self.tokenizer, date)
            elif not config.template and self.tokenizer.chat_template:
                chat_template = load_template(OWN, self.tokenizer, date)
        except UserError as error:
            raise UserError(f"{config.task_name}: {error}") from None
        return Encoder(self.tokenizer, template, config.loss or "assistant", config.turns or "auto", chat_template)

    def files_to_keep(self) -> dict[str, Path | str]:
        """What a trained model needs to be used: the tokenizer's files, and the template that it was trained with.

        File name -> the file, or its text. Of several templates, that of the largest dataset that names one.
        """
        template = self.main_template()
        files: dict[str, Path | str] = {
            f"{CHAT_TEMPLATES}/{file.name}" if file.parent.name == CHAT_TEMPLATES else file.name: file
            for file in self.tokenizer.files
        }
        if template is None or template.name == OWN:
            return files
        files = {name: file for name, file in files.items() if not name.startswith(CHAT_TEMPLATES)}
        return files | {CHAT_TEMPLATE: template.texts["default"]}

    def main_template(self) -> Template | None:
        """The named template of the dataset with the largest share of those that name one."""
        named = [(share, number) for number, share in enumerate(self.shares()) if self.encoders[number].template]
        return self.encoders[max(named)[1]].template if named else None

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
            "template": encoder.template.checksum if encoder.template else config.template,
            "chat_template": encoder.chat_template.checksum if encoder.chat_template else "",
            "loss": encoder.loss,
            "turns": encoder.turns,
        }

    def notes(self) -> list[str]:
        """Settings that contradict the data or the tokenizer, a line each."""
        notes = [
            f"{config.task_name}: nlines is {config.nlines} in the configuration, {dataset.size} in {config.path}"
            for config, dataset in zip(self.configs, self.datasets)
            if config.nlines is not None and config.nlines != dataset.size
        ]
        return notes + self.template_notes()

    def template_notes(self) -> list[str]:
        """Templates that do not belong to the tokenizer, a line each."""
        notes = []
        for config, encoder in zip(self.configs, self.encoders):
            template = encoder.template or encoder.chat_template
            missing = (
                [marker for marker in template.markers if self.tokenizer.token_id(marker) is None] if template else []
            )
            if template and missing:
                notes.append(
                    f"{config.task_name}: the template {template.name} writes {', '.join(missing[:4])}, which the "
                    "tokenizer has no token for and spells in pieces; is it the template of this tokenizer?"
                )
        return notes

    def describe(self) -> list[str]:
        """How the records become text, a line each."""
        kinds: dict[str, list[str]] = {}
        for config, encoder in zip(self.configs, self.encoders):
            kinds.setdefault(_template_in_words(encoder), []).append(config.task_name)
        lines = [words if len(kinds) == 1 else f"{', '.join(tasks)}: {words}" for words, tasks in kinds.items()]
        return lines + ([f"templates write {self.date} as today's date (template_date)"] if self.date else [])

    def preview(self, records: int = 64) -> list[str]:
        """What is lost or likely not meant in some records of each dataset, the same in every process, a line each."""
        notes = []
        for number, dataset in enumerate(self.datasets):
            size = len(dataset)
            drawn = Permutation(size, self.seed, _MEAN, self.keys[number])(np.arange(min(records, size))).tolist()
            found: Counter[str] = Counter()
            for place in drawn:
                record, texts = self._rendered(number, place, place)
                found.update(self.encoders[number].findings(record, texts))
            notes += finding_notes(self.configs[number].task_name, found, len(drawn))
        return notes

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


def finding_notes(task: str, findings: Counter[str], records: int) -> list[str]:
    """What was found in so many records of a dataset, a line each."""
    return [
        f"{task}: {count} of {records} records ({count / records:.1%}) have {what}"
        for what, count in findings.most_common()
    ]


def _template_in_words(encoder: Encoder) -> str:
    if encoder.template:
        return f"conversations and pairs are written with the template {encoder.template.name}"
    if encoder.chat_template:
        return "pairs are as they are, conversations are written with the tokenizer's own template"
    return "pairs are as they are; there is no template for conversations"


def _opened(config: DatasetConfig) -> IndexedDataset:
    try:
        return IndexedDataset(config.path, config.max_samples)
    except UserError as error:
        raise UserError(f"{config.task_name}: path: {error}") from None
    except OSError as error:  # a name that is too long, say
        raise UserError(f"{config.task_name}: path: {config.path}: {error.strerror}") from None


def _transform(config: DatasetConfig) -> Transform | None:
    where = f"{config.task_name}: transforms: {config.transforms}"
    return load_transform(Path(config.transforms), where, config.transform_timeout) if config.transforms else None


def _checksum(files: Iterable[Path]) -> str:
    value = 0
    for file in files:
        value = zlib.crc32(file.read_bytes(), value)
    return f"{value:08x}"
