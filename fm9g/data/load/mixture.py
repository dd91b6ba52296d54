"""A mixture: several indexed datasets as one source of samples, each addressed by (dataset, sample index).

A sample index is a position in a dataset's endless sequence of epochs; every epoch is a new permutation of its records.
"""

from __future__ import annotations

import datetime
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm9g.config.mixture import NO_TEMPLATE, TOKENIZER_TEMPLATE, DatasetConfig
from fm9g.data.encode.encoder import Encoder, RenderedRecord
from fm9g.data.encode.encoding_limits import UnreadableTextError
from fm9g.data.encode.escaping import escape_special_tokens
from fm9g.data.encode.new_tokens import fresh_tokens, new_token_files
from fm9g.data.encode.oversize import EncodedRecord, split_or_truncate
from fm9g.data.encode.record_issues import find_issues
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_files import CHAT_TEMPLATE, CHAT_TEMPLATES
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.transform import TrackedRandom, Transform, guard_user_code, load_transform, safe_repr
from fm9g.data.load.epoch_order import EpochOrder
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.load.record_sample import RecordSample
from fm9g.data.load.token_cache import TokenCache, cache_mismatches
from fm9g.data.prepare.record_formats import Record, canonicalize
from fm9g.data.prepare.values import BadRecord
from fm9g.data.shuffle import Permutation, splitmix64
from fm9g.errors import UserError

_TRANSFORM_SALT, _PROBE_SALT = 2, 3  # keep these random numbers apart from those of other purposes
_CACHE_VERSION = 2


class MixtureSpec(NamedTuple):
    """The arguments of Mixture, to open it in a worker. tokenizer: opened, or its path."""

    configs: Sequence[DatasetConfig]
    tokenizer: str | Tokenizer
    max_length: int
    seed: int
    row_length: int
    token_cache_dir: str = ""
    date: str = ""
    collect_issues: bool = False
    samples_per_pack: int = 0


class Mixture:
    """Opened datasets with their transforms, templates and tokenizer: a pure function from indices to samples."""

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
        samples_per_pack: int = 0,
    ) -> None:
        """Opens everything that encoding needs.

        Args:
            tokenizer: opened, or its path.
            max_length: tokens per sample, at most.
            row_length: tokens per row, at least max_length; 0: max_length.
            token_cache_dir: folder of the datasets' token caches, see `build_token_cache`; missing and stale ones are
                ignored.
            date: what templates write as today's date, YYYY-MM-DD; empty: today.
            collect_issues: count the issues of rendered records in `issues`.
            samples_per_pack: samples in a row, at most; 0: as many as fit.

        Raises UserError for what is missing or unreadable.
        """
        self.configs, self.max_length, self.seed = list(configs), max_length, seed
        self.row_length, self.samples_per_pack = row_length or max_length, samples_per_pack
        assert self.row_length >= max_length  # otherwise a sample might fit into no row
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        date = date or datetime.date.today().isoformat()
        # Workers get the opened tokenizer: opening it imports transformers, which takes seconds.
        self.spec = MixtureSpec(
            configs,
            self.tokenizer,
            max_length,
            seed,
            self.row_length,
            token_cache_dir,
            date,
            collect_issues,
            samples_per_pack,
        )
        self.datasets = [_open_dataset(config) for config in configs]
        self.transforms = [_load_transform(config) for config in configs]
        self.encoders = [self._make_encoder(config, date) for config in configs]
        templates = [item for encoder in self.encoders for item in (encoder.template, encoder.chat_template) if item]
        self.date = date if any(template.uses_date for template in templates) else ""  # empty: samples do not need it
        self.keys = [zlib.crc32(config.task_name.encode()) for config in configs]
        self._orders = [EpochOrder(len(dataset), seed, key) for dataset, key in zip(self.datasets, self.keys)]
        self.used_rng = [False for _ in configs]  # whether a transform of the dataset drew random numbers
        self.issues: list[Counter[str]] = [Counter() for _ in configs]  # see fm9g.data.encode.record_issues
        self.caches = [self._open_cache(number) if token_cache_dir else None for number in range(len(configs))]

    def _make_encoder(self, config: DatasetConfig, date: str) -> Encoder:
        template = chat_template = None
        try:
            if config.chat_template not in ("", NO_TEMPLATE):
                template = load_template(config.chat_template, self.tokenizer, date)
            elif not config.chat_template and self.tokenizer.chat_template:
                chat_template = load_template(TOKENIZER_TEMPLATE, self.tokenizer, date)
        except UserError as error:
            raise UserError(f"{config.task_name}: {error}") from None
        if config.system and template is None:
            raise UserError(f"{config.task_name}: system: needs a chat_template, such as tokenizer or chatml")
        loss, turns = config.train_on or "assistant", config.turns or "auto"
        return Encoder(self.tokenizer, template, loss, turns, chat_template, config.system)

    # Which records

    def proportions(self) -> list[float]:
        """Each dataset's share of tokens: abs_weight, or weight times the bytes of the records used; sum 1."""
        weights = [
            config.weight * dataset.used_bytes if config.abs_weight is None else config.abs_weight
            for config, dataset in zip(self.configs, self.datasets)
        ]
        weights = [weight / max(weights) for weight in weights]  # so that the sum does not overflow
        return [weight / sum(weights) for weight in weights]

    def record_indices(self, dataset: int, sample_indices: Sequence[int]) -> np.ndarray:
        """(n,) the records of a dataset at these sample indices."""
        return self._orders[dataset].record_indices(sample_indices)

    def probe_indices(self, dataset: int, count: int) -> list[int]:
        """Some record indices of a dataset, the same in every process."""
        size = len(self.datasets[dataset])
        permutation = Permutation(size, self.seed, _PROBE_SALT, self.keys[dataset])
        return [int(index) for index in permutation(np.arange(min(count, size)))]

    @property
    def is_concatenated(self) -> bool:
        """Without packing and without shares, an epoch has each record of all datasets once."""
        has_shares = any(config.abs_weight is not None or config.weight != 1.0 for config in self.configs)
        return bool(self.samples_per_pack) and (len(self.configs) == 1 or not has_shares)

    # From a record to its samples

    def encode(self, dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        """Encodes the records at these sample indices. Raises UserError that names dataset and line of a bad record."""
        tokens = self.read_tokens(dataset, self.record_indices(dataset, sample_indices), sample_indices)
        return [self.split_or_truncate(dataset, record) for record in tokens]

    def split_or_truncate(self, dataset: int, tokens: np.ndarray) -> EncodedRecord:
        """Divides the token array of a record into samples, by the dataset's oversize_rule."""
        return split_or_truncate(tokens, self.max_length, self.configs[dataset].rule_for_long_records, self.row_length)

    def read_tokens(self, dataset: int, record_indices: np.ndarray, sample_indices: Sequence[int]) -> list[np.ndarray]:
        """The token arrays of records, from the token cache if there is one."""
        if cache := self.caches[dataset]:
            return cache.read(record_indices)
        return self.tokenize_records(dataset, record_indices.tolist(), sample_indices)

    def tokenize_records(
        self, dataset: int, record_indices: Sequence[int], sample_indices: Sequence[int]
    ) -> list[np.ndarray]:
        """The token arrays of records. sample_indices: seed the random numbers of their transforms."""
        rendered = [self.render(dataset, *indices) for indices in zip(record_indices, sample_indices)]
        return self.tokenize(rendered, dataset, record_indices)

    def tokenize(self, rendered: list[RenderedRecord], dataset: int, record_indices: Sequence[int]) -> list[np.ndarray]:
        """The token arrays of rendered records."""
        try:
            return self.encoders[dataset].tokenize(rendered)
        except (TypeError, UnicodeEncodeError, UnreadableTextError) as error:  # a lone surrogate is no text
            numbers = map(self.datasets[dataset].line_number, record_indices)
            lines, config = ", ".join(map(str, numbers)), self.configs[dataset]
            raise UserError(
                f"{config.task_name}, one of the lines {lines} of {config.path}: its text cannot be encoded: {error}"
            ) from None

    def render(
        self, dataset: int, record_index: int, sample_index: int, with_content_spans: bool = False
    ) -> RenderedRecord:
        """The text of a record. with_content_spans: see Encoder.render."""
        record = self.read_record(dataset, record_index, sample_index)
        rendered = self._render(dataset, record_index, record, with_content_spans)
        if self.spec.collect_issues:
            self.issues[dataset].update(find_issues(self.encoders[dataset], record, rendered))
        return rendered

    def find_issues(self, dataset: int, record_index: int, sample_index: int) -> list[str]:
        """The issues of a record, see fm9g.data.encode.record_issues."""
        record = self.read_record(dataset, record_index, sample_index)
        return find_issues(self.encoders[dataset], record, self._render(dataset, record_index, record))

    def _render(
        self, dataset: int, record_index: int, record: Record, with_content_spans: bool = False
    ) -> RenderedRecord:
        is_transformed = self.transforms[dataset] is not None
        try:
            return self.encoders[dataset].render(record, is_transformed, with_content_spans)
        except BadRecord as error:
            raise UserError(f"{self._location(dataset, record_index)}: {error}") from None
        except (AttributeError, KeyError, TypeError) as error:
            if is_transformed or not self.datasets[dataset].is_canonical:
                raise
            where = self._location(dataset, record_index)
            raise UserError(f"{where}: was changed after indexing; index the dataset again ({error!r})") from error

    def read_record(self, dataset: int, record_index: int, sample_index: int) -> Record:
        """A record in canonical form, as its dataset's transform returns it. Raises UserError that names its line.

        Indexing has converted most records. Only those that a transform returns, or that were indexed as they are, may
        still have another format.
        """
        record, transform = self.datasets[dataset][record_index], self.transforms[dataset]
        if transform is not None:
            record = self._apply_transform(record, transform, dataset, record_index, sample_index)
        elif self.datasets[dataset].is_canonical:
            return record
        try:
            return canonicalize(record)[1]
        except BadRecord as error:
            raise UserError(f"{self._location(dataset, record_index)}: {error}") from None

    def _apply_transform(
        self, record: Record, transform: Transform, dataset: int, record_index: int, sample_index: int
    ) -> Record:
        """The record that the user's transform returns; special tokens are escaped in its input and in the result."""
        config, where = self.configs[dataset], self._location(dataset, record_index)
        rng = TrackedRandom(splitmix64(self.seed, _TRANSFORM_SALT, self.keys[dataset], sample_index))
        weights = config.incontext_weight
        num_shots = rng.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
        with guard_user_code(where, config.transform_timeout):
            record = transform(escape_special_tokens(record, self.tokenizer.special_pattern), num_shots, rng)
            if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
                raise UserError(f'{where}: returned {safe_repr(record)}, expected {{"input": str, "output": str}}')
        self.used_rng[dataset] |= rng.used_rng
        return record

    def _location(self, dataset: int, record_index: int) -> str:
        """Names a record for messages."""
        config = self.configs[dataset]
        script = f", {config.transforms}" if self.transforms[dataset] else ""
        line = self.datasets[dataset].line_number(record_index)
        return f"{config.task_name}, line {line} of {config.path}{script}"

    # What the samples depend on

    def encoding_fingerprint(self, dataset: int) -> dict[str, Any]:
        """What the tokens of a given record depend on, as JSON."""
        config, encoder = self.configs[dataset], self.encoders[dataset]
        return {
            "tokenizer": _checksum(self.tokenizer.files, "\n".join(fresh_tokens(self.tokenizer))),
            "transforms": _checksum([Path(config.transforms)] if config.transforms else []),
            "template": encoder.template.checksum if encoder.template else config.chat_template,
            "chat_template": encoder.chat_template.checksum if encoder.chat_template else "",
            "loss": encoder.loss,
            "turns": encoder.turns,
            **({"system": encoder.system} if encoder.system else {}),
        }

    def cache_key(self, dataset: int) -> dict[str, Any]:
        """What a token cache of the dataset depends on, as JSON."""
        records = self.datasets[dataset]
        return {
            "version": _CACHE_VERSION,
            "data": str(records.folder),
            "records": len(records),
            "bytes": records.nbytes,
            "modified": records.mtime_ns,
            **({"sample": repr(records.sample)} if records.sample else {}),
            **self.encoding_fingerprint(dataset),
        }

    def cache_folder(self, dataset: int) -> Path:
        """The folder of the dataset's token cache."""
        name = re.sub(r"[^\w-]", "_", self.configs[dataset].task_name)
        return Path(self.spec.token_cache_dir) / f"{name}-{self.keys[dataset]:08x}"

    def _open_cache(self, dataset: int) -> TokenCache | None:
        folder = self.cache_folder(dataset)
        is_valid = cache_mismatches(folder, self.cache_key(dataset)) == []
        return TokenCache(folder, len(self.datasets[dataset])) if is_valid else None

    # What is exported with a model

    def main_template(self) -> Template | None:
        """The template of the dataset with the largest share, among those that name one."""
        named = [(share, number) for number, share in enumerate(self.proportions()) if self.encoders[number].template]
        return self.encoders[max(named)[1]].template if named else None

    def tokenizer_export_files(self) -> dict[str, Path | str]:
        """The tokenizer's files and the main template: what another program needs to use the trained model.

        Returns file name -> the file, or its text.
        """
        template = self.main_template()
        files: dict[str, Path | str] = {
            f"{CHAT_TEMPLATES}/{file.name}" if file.parent.name == CHAT_TEMPLATES else file.name: file
            for file in self.tokenizer.files
        } | new_token_files(self.tokenizer)
        if template is None or template.name == TOKENIZER_TEMPLATE:
            return files
        files = {name: file for name, file in files.items() if not name.startswith(CHAT_TEMPLATES)}
        return files | {CHAT_TEMPLATE: template.sources["default"]}


def _open_dataset(config: DatasetConfig) -> IndexedDataset:
    try:
        sample = RecordSample(config.sample, config.sample_skip, config.sample_seed)
        return IndexedDataset(config.path, config.max_samples, sample=sample)
    except UserError as error:
        raise UserError(f"{config.task_name}: path: {error}") from None
    except OSError as error:  # a name that is too long, for example
        raise UserError(f"{config.task_name}: path: {config.path}: {error.strerror}") from None


def _load_transform(config: DatasetConfig) -> Transform | None:
    where = f"{config.task_name}: transforms: {config.transforms}"
    return load_transform(Path(config.transforms), where, config.transform_timeout) if config.transforms else None


def _checksum(files: Iterable[Path], text: str = "") -> str:
    value = zlib.crc32(text.encode())
    for file in files:
        value = zlib.crc32(file.read_bytes(), value)
    return f"{value:08x}"
