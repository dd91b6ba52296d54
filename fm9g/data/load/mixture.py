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

from fm9g.config.mixture import NO_TEMPLATE, TOKENIZER_TEMPLATE, DatasetConfig
from fm9g.data.encode.encoder import EncodedRecord, Encoder, RenderedRecord, split_or_truncate
from fm9g.data.encode.encoding_limits import UnreadableTextError
from fm9g.data.encode.escaping import escape_special_tokens
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.tokenizer import CHAT_TEMPLATE, CHAT_TEMPLATES, Tokenizer, load_tokenizer
from fm9g.data.encode.transform import TrackedRandom, Transform, guard_user_code, load_transform, safe_repr
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.load.token_cache import TokenCache, cache_mismatches
from fm9g.data.prepare.record_formats import BadRecord
from fm9g.data.shuffle import Permutation, splitmix64
from fm9g.errors import UserError

_SHUFFLE_SALT, _TRANSFORM_SALT, _PROBE_SALT = 1, 2, 3  # what a random number is for
_PROBE_RECORDS = 256  # records that an unknown average length is measured on
_CACHE_VERSION = 2
_SMALL_DATASET, _MAX_CACHED_EPOCHS = 4096, 1024  # records of a small dataset, and epochs that are remembered


class MixtureSpec(NamedTuple):
    """What a mixture is opened from, in this process or in a worker. tokenizer: opened, or its path."""

    configs: Sequence[DatasetConfig]
    tokenizer: str | Tokenizer
    max_length: int
    seed: int
    row_length: int
    token_cache_dir: str = ""
    date: str = ""
    collect_issues: bool = False


class Mixture:
    """Opened datasets with transforms, templates and tokenizer; a pure function from (dataset, place) to samples."""

    def __init__(
        self,
        configs: Sequence[DatasetConfig],
        tokenizer: str | Tokenizer,
        max_length: int,
        seed: int,
        row_length: int = 0,
        token_cache_dir: str = "",
        date: str = "",
        collect_issues: bool = False,
    ) -> None:
        """tokenizer: opened, or its path. row_length: tokens of a row, at least max_length and as much by default.
        token_cache_dir: a folder with the caches of the datasets, from `build_token_cache`; missing and stale ones are
        not used. date: what templates write as today's, YYYY-MM-DD; empty: today. collect_issues: what is
        found in records is counted.

        Raises UserError for what is missing or cannot be read.
        """
        self.configs, self.max_length, self.seed = list(configs), max_length, seed
        self.row_length = row_length or max_length
        assert self.row_length >= max_length  # else a sample might fit into no row
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        date = date or datetime.date.today().isoformat()
        # Workers get the opened tokenizer: opening it takes transformers, and seconds.
        self.spec = MixtureSpec(
            configs, self.tokenizer, max_length, seed, self.row_length, token_cache_dir, date, collect_issues
        )
        self.collect_issues = collect_issues
        self.datasets = [_open_dataset(config) for config in configs]
        self.transforms = [_load_transform(config) for config in configs]
        self.encoders = [self._make_encoder(config, date) for config in configs]
        templates = [item for encoder in self.encoders for item in (encoder.template, encoder.chat_template) if item]
        self.date = date if any(template.uses_date for template in templates) else ""  # the samples depend on it
        self.keys = [zlib.crc32(config.task_name.encode()) for config in configs]
        self.used_rng = [False for _ in configs]  # whether a transform of the dataset used its random numbers
        self.issues: list[Counter[str]] = [Counter() for _ in configs]  # what was found in records, see Encoder
        self._epochs: dict[tuple[int, int], Callable[[np.ndarray], np.ndarray]] = {}
        self.caches: list[TokenCache | None] = [None for _ in configs]
        if token_cache_dir:
            for number in range(len(configs)):
                folder = self.cache_folder(number)
                if cache_mismatches(folder, self.cache_key(number)) == []:
                    self.caches[number] = TokenCache(folder, len(self.datasets[number]))

    def record_indices(self, dataset: int, sample_indices: Sequence[int]) -> np.ndarray:
        """(n,) the records at places of a dataset's sequence of epochs."""
        size = len(self.datasets[dataset])
        epochs, offsets = np.divmod(np.array(sample_indices, np.int64), size)
        record_indices = np.empty_like(offsets)
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            record_indices[here] = self._epoch_permutation(dataset, epoch)(offsets[here])
        return record_indices

    def _epoch_permutation(self, dataset: int, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """The permutation of an epoch; of a small dataset, which makes many of them, all of it at once."""
        key = dataset, epoch
        if key not in self._epochs:
            if len(self._epochs) >= _MAX_CACHED_EPOCHS:
                self._epochs.clear()
            size = len(self.datasets[dataset])
            permutation = Permutation(size, self.seed, _SHUFFLE_SALT, self.keys[dataset], epoch)
            self._epochs[key] = permutation(np.arange(size)).__getitem__ if size <= _SMALL_DATASET else permutation
        return self._epochs[key]

    def encode(self, dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        """The samples of the records at places. Raises UserError that names dataset and line of a bad record."""
        record_indices, cached = self.record_indices(dataset, sample_indices), self.caches[dataset]
        tokens = (
            cached.read(record_indices)
            if cached
            else self.tokenize_records(dataset, record_indices.tolist(), sample_indices)
        )
        return [self.split_or_truncate(dataset, record) for record in tokens]

    def split_or_truncate(self, dataset: int, tokens: np.ndarray) -> EncodedRecord:
        """The samples that the marked tokens of a record of the dataset give."""
        return split_or_truncate(tokens, self.max_length, self.configs[dataset].oversize_rule, self.row_length)

    def tokenize_records(
        self, dataset: int, record_indices: Sequence[int], sample_indices: Sequence[int]
    ) -> list[np.ndarray]:
        """The marked tokens of records, by number. sample_indices: what the random numbers of their transforms depend
        on."""
        return self.tokenize(
            [self.render(dataset, n, sample_index) for n, sample_index in zip(record_indices, sample_indices)],
            dataset,
            record_indices,
        )

    def tokenize(self, rendered: list[RenderedRecord], dataset: int, record_indices: Sequence[int]) -> list[np.ndarray]:
        """The marked tokens of the texts of records."""
        try:
            return self.encoders[dataset].tokenize(rendered)
        except (TypeError, UnicodeEncodeError, UnreadableTextError) as error:  # a lone surrogate is no text
            lines, config = ", ".join(str(number + 1) for number in record_indices), self.configs[dataset]
            where = f"{config.task_name}, one of the lines {lines} of {config.path}"
            raise UserError(f"{where}: the text that is made of it cannot be encoded: {error}") from None

    def render(
        self, dataset: int, record_index: int, sample_index: int, with_content_spans: bool = False
    ) -> RenderedRecord:
        """What is to be encoded of a record. with_content_spans: as in Encoder.render."""
        record, rendered = self._read_and_render(dataset, record_index, sample_index, with_content_spans)
        if self.collect_issues:
            self.issues[dataset].update(self.encoders[dataset].find_issues(record, rendered))
        return rendered

    def _read_and_render(
        self, dataset: int, record_index: int, sample_index: int, with_content_spans: bool = False
    ) -> tuple[dict[str, Any], RenderedRecord]:
        """A record, as its transform returns it, and its texts."""
        record = self.datasets[dataset][record_index]
        config, transform = self.configs[dataset], self.transforms[dataset]
        script = f", {config.transforms}" if transform else ""
        where = f"{config.task_name}, line {record_index + 1} of {config.path}{script}"
        if transform is not None:
            record = self._apply_transform(record, transform, dataset, sample_index, where)
        try:
            return record, self.encoders[dataset].render(record, transform is not None, with_content_spans)
        except BadRecord as error:
            raise UserError(f"{where}: {error}") from None

    def _apply_transform(
        self, record: dict, transform: Transform, dataset: int, sample_index: int, where: str
    ) -> dict[str, Any]:
        source = TrackedRandom(splitmix64(self.seed, _TRANSFORM_SALT, self.keys[dataset], sample_index))
        weights = self.configs[dataset].incontext_weight
        shots = source.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
        with guard_user_code(where, self.configs[dataset].transform_timeout):
            record = transform(escape_special_tokens(record, self.tokenizer.special_pattern), shots, source)
            if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
                raise UserError(f'{where}: returned {safe_repr(record)}, expected {{"input": str, "output": str}}')
        self.used_rng[dataset] |= source.used_rng
        return record

    def _make_encoder(self, config: DatasetConfig, date: str) -> Encoder:
        template = chat_template = None
        try:
            if config.chat_template not in ("", NO_TEMPLATE):
                template = load_template(config.chat_template, self.tokenizer, date)
            elif not config.chat_template and self.tokenizer.chat_template:
                chat_template = load_template(TOKENIZER_TEMPLATE, self.tokenizer, date)
        except UserError as error:
            raise UserError(f"{config.task_name}: {error}") from None
        return Encoder(self.tokenizer, template, config.train_on or "assistant", config.turns or "auto", chat_template)

    def tokenizer_export_files(self) -> dict[str, Path | str]:
        """What a trained model needs to be used: the tokenizer's files, and the template that it was trained with.

        File name -> the file, or its text. Of several templates, that of the largest dataset that names one.
        """
        template = self.main_template()
        files: dict[str, Path | str] = {
            f"{CHAT_TEMPLATES}/{file.name}" if file.parent.name == CHAT_TEMPLATES else file.name: file
            for file in self.tokenizer.files
        }
        if template is None or template.name == TOKENIZER_TEMPLATE:
            return files
        files = {name: file for name, file in files.items() if not name.startswith(CHAT_TEMPLATES)}
        return files | {CHAT_TEMPLATE: template.sources["default"]}

    def main_template(self) -> Template | None:
        """The named template of the dataset with the largest share of those that name one."""
        named = [(share, number) for number, share in enumerate(self.proportions()) if self.encoders[number].template]
        return self.encoders[max(named)[1]].template if named else None

    def cache_folder(self, dataset: int) -> Path:
        name = re.sub(r"[^\w-]", "_", self.configs[dataset].task_name)
        return Path(self.spec.token_cache_dir) / f"{name}-{self.keys[dataset]:08x}"

    def cache_key(self, dataset: int) -> dict[str, Any]:
        """What the tokens of a dataset's records depend on, as JSON."""
        records = self.datasets[dataset]
        return {
            "version": _CACHE_VERSION,
            "data": str(records.folder),
            "records": len(records),
            "bytes": records.nbytes,
            "modified": records.mtime_ns,
            **self.encoding_fingerprint(dataset),
        }

    def encoding_fingerprint(self, dataset: int) -> dict[str, Any]:
        """What turns a dataset's records into tokens, as JSON."""
        config, encoder = self.configs[dataset], self.encoders[dataset]
        return {
            "tokenizer": _checksum(self.tokenizer.files),
            "transforms": _checksum([Path(config.transforms)] if config.transforms else []),
            "template": encoder.template.checksum if encoder.template else config.chat_template,
            "chat_template": encoder.chat_template.checksum if encoder.chat_template else "",
            "loss": encoder.loss,
            "turns": encoder.turns,
        }

    def notes(self) -> list[str]:
        """Settings that contradict the data or the tokenizer, a line each."""
        notes = [
            f"{config.task_name}: nlines is {config.nlines} in the configuration, {dataset.num_stored} in {config.path}"
            for config, dataset in zip(self.configs, self.datasets)
            if config.nlines is not None and config.nlines != dataset.num_stored
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
            kinds.setdefault(_describe_template(encoder), []).append(config.task_name)
        lines = [words if len(kinds) == 1 else f"{', '.join(tasks)}: {words}" for words, tasks in kinds.items()]
        return lines + ([f"templates write {self.date} as today's date (chat_template_date)"] if self.date else [])

    def preview(self, records: int = 64) -> list[str]:
        """What is lost or likely not meant in some records of each dataset, the same in every process, a line each."""
        notes = []
        for number, dataset in enumerate(self.datasets):
            size = len(dataset)
            drawn = Permutation(size, self.seed, _PROBE_SALT, self.keys[number])(np.arange(min(records, size))).tolist()
            found: Counter[str] = Counter()
            for sample_index in drawn:
                record, rendered = self._read_and_render(number, sample_index, sample_index)
                found.update(self.encoders[number].find_issues(record, rendered))
            notes += issue_notes(self.configs[number].task_name, found, len(drawn))
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
            _, tokens = self._tokenize_probe(number)
            lengths = [
                len(segment) - 1 for record in tokens for segment in self.split_or_truncate(number, record).segments
            ]
            means.append(sum(lengths) / len(lengths) if lengths else 1.0)
        return means

    def count_tokens(self) -> float:
        """About how many tokens all records together give, once each: measured on the same records as mean_tokens."""
        total = 0.0
        for number, dataset in enumerate(self.datasets):
            drawn, tokens = self._tokenize_probe(number)
            segments = (segment for record in tokens for segment in self.split_or_truncate(number, record).segments)
            total += sum(len(segment) - 1 for segment in segments) / len(drawn) * len(dataset)
        return total

    def _tokenize_probe(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Some records of a dataset, the same in every process, and their marked tokens."""
        size = len(self.datasets[number])
        drawn = Permutation(size, self.seed, _PROBE_SALT, self.keys[number])(np.arange(min(_PROBE_RECORDS, size)))
        cached = self.caches[number]
        return drawn, cached.read(drawn) if cached else self.tokenize_records(
            number, drawn.tolist(), sample_indices=drawn.tolist()
        )

    def proportions(self) -> list[float]:
        """The share of tokens that each dataset is to have: abs_weight, or weight times the size in bytes; sum 1."""
        weights = [
            config.weight * dataset.nbytes if config.abs_weight is None else config.abs_weight
            for config, dataset in zip(self.configs, self.datasets)
        ]
        weights = [weight / max(weights) for weight in weights]  # so that no sum is too large
        return [weight / sum(weights) for weight in weights]


def issue_notes(task: str, issues: Counter[str], records: int) -> list[str]:
    """What was found in so many records of a dataset, a line each."""
    return [
        f"{task}: {count} of {records} records ({count / records:.1%}) have {what}"
        for what, count in issues.most_common()
    ]


def _describe_template(encoder: Encoder) -> str:
    if encoder.template:
        return f"conversations and pairs are written with the template {encoder.template.name}"
    if encoder.chat_template:
        return "pairs are as they are, conversations are written with the tokenizer's own template"
    return "pairs are as they are; there is no template for conversations"


def _open_dataset(config: DatasetConfig) -> IndexedDataset:
    try:
        return IndexedDataset(config.path, config.max_samples)
    except UserError as error:
        raise UserError(f"{config.task_name}: path: {error}") from None
    except OSError as error:  # a name that is too long, say
        raise UserError(f"{config.task_name}: path: {config.path}: {error.strerror}") from None


def _load_transform(config: DatasetConfig) -> Transform | None:
    where = f"{config.task_name}: transforms: {config.transforms}"
    return load_transform(Path(config.transforms), where, config.transform_timeout) if config.transforms else None


def _checksum(files: Iterable[Path]) -> str:
    value = 0
    for file in files:
        value = zlib.crc32(file.read_bytes(), value)
    return f"{value:08x}"
