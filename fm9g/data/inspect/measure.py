"""Encodes the records of a dataset once and measures them: token counts, duplicates, losses.

The lengths of all samples are arrays on disk, 28 bytes per record with one sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fm9g.data.encode.oversize import EMPTY, LONG_INPUT, OVERSIZE, EncodedRecord
from fm9g.data.encode.token_array import split_samples
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.progress import Progress

_BLOCK = 1 << 20  # elements of an array on disk that are in memory at a time

DatasetStats = dict[str, Any]  # of check.json


class MeasuredDataset(NamedTuple):
    """A dataset's statistics, and arrays over the samples of the records that were read.

    Args:
        stats: for check.json.
        lengths: (samples,) int32, tokens that a row holds: one fewer than the token array, which includes the last
            target.
        prompt_lengths: (samples,) int32, tokens before the first trained one.
        sorted_lengths: (samples,) int32, `lengths` in ascending order.
        bounds: (records + 1,) int64: record i has the samples bounds[i] to bounds[i + 1].
    """

    stats: DatasetStats
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    sorted_lengths: np.ndarray
    bounds: np.ndarray


def measure_dataset(pool: EncodingPool, dataset: int, count: int, file: Path, progress: Progress) -> MeasuredDataset:
    """Encodes `count` records of a dataset, evenly spread over it.

    Args:
        pool: encodes the records.
        dataset: its number in the mixture.
        file: prefix of the paths of the arrays on disk.
        progress: advanced per record.
    """
    size = len(pool.mixture.datasets[dataset])
    counts = _SampleCounts()
    with _ArrayFiles(file) as arrays:
        indices = (i * size // count for i in range(count))
        for record_indices, tokens in pool.tokenize(dataset, indices, in_file_order=True):
            samples = [split_samples(record) for record in tokens]
            for sample in chain.from_iterable(samples):
                counts.add(sample, pool.mixture.split_or_truncate(dataset, sample))
            # The last line may lack its newline.
            lines = (pool.mixture.datasets[dataset].line(index).removesuffix(b"\n") for index in record_indices)
            arrays.write(samples, [hashlib.blake2b(line, digest_size=8).digest() for line in lines])
            progress.advance(len(record_indices))
    shutil.copyfile(arrays.path("lengths"), arrays.path("sorted"))
    sorted_lengths = np.memmap(arrays.path("sorted"), np.int32, "r+")
    sorted_lengths.sort()
    stats = {
        "records": size,
        "read": count,
        "samples": len(sorted_lengths),
        **_length_stats(sorted_lengths),
        **counts.stats(),
        "duplicates": _count_duplicates(arrays.path("hashes")),
        "findings": dict(pool.mixture.issues[dataset]),
    }
    lengths, prompt_lengths = (np.memmap(arrays.path(name), np.int32, "r") for name in ("lengths", "prompt_lengths"))
    bounds = np.memmap(arrays.path("bounds"), np.int64, "r")
    return MeasuredDataset(stats, lengths, prompt_lengths, sorted_lengths, bounds)


class _ArrayFiles:
    """Arrays that grow on disk while records are encoded. A context manager, which closes the files."""

    def __init__(self, prefix: Path) -> None:
        self._prefix, self._stack, self._num_samples = prefix, contextlib.ExitStack(), 0
        self._files = {
            name: self._stack.enter_context(self.path(name).open("wb"))
            for name in ("lengths", "prompt_lengths", "bounds", "hashes")
        }
        self._append("bounds", [0], np.int64)

    def path(self, name: str) -> Path:
        return self._prefix.with_suffix(f".{name}")

    def write(self, records: list[list[np.ndarray]], hashes: list[bytes]) -> None:
        """Appends records. records: token arrays of the samples of each. hashes: 8 bytes of each."""
        samples = list(chain.from_iterable(records))
        self._append("lengths", [max(0, len(sample) - 1) for sample in samples], np.int32)
        prompts = [int(np.argmax(sample[1:] >= 0)) if len(sample) > 1 else 0 for sample in samples]
        self._append("prompt_lengths", prompts, np.int32)
        bounds = self._num_samples + np.cumsum([len(record) for record in records], dtype=np.int64)
        self._append("bounds", bounds, np.int64)
        self._files["hashes"].write(b"".join(hashes))
        self._num_samples += len(samples)

    def _append(self, name: str, values: list[int] | np.ndarray, dtype: type) -> None:
        self._files[name].write(np.array(values, dtype).tobytes())

    def __enter__(self) -> _ArrayFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class _SampleCounts:
    """Counts samples by how they are handled: kept, truncated, segmented, dropped."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._num_dropped = {LONG_INPUT: 0, OVERSIZE: 0, EMPTY: 0}

    def add(self, sample: np.ndarray, encoded: EncodedRecord) -> None:
        """encoded: the sample after the dataset's oversize_rule."""
        if encoded.skipped:
            self._num_dropped[encoded.skipped] += 1
            return
        segments = encoded.segments
        self._counts["kept_tokens"] += sum(len(segment) - 1 for segment in segments)
        self._counts["learnt_tokens"] += sum(int(np.count_nonzero(segment[1:] >= 0)) for segment in segments)
        if len(segments) > 1:
            self._counts["segmented"] += 1
            self._counts["segments"] += len(segments)
        elif len(segments[0]) < len(sample):
            self._counts["truncated"] += 1

    def stats(self) -> DatasetStats:
        dropped = dict(self._num_dropped)
        empty = dropped.pop(EMPTY)
        keys = ("kept_tokens", "learnt_tokens", "truncated", "segmented", "segments")
        return {**{key: self._counts[key] for key in keys}, "dropped": dropped, "empty": empty}


def _length_stats(sorted_lengths: np.ndarray) -> DatasetStats:
    not_empty = sorted_lengths[np.searchsorted(sorted_lengths, np.int32(1)) :]
    total = int(sorted_lengths.sum(dtype=np.int64))
    quantiles = (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("max", 1.0))
    return {
        "tokens": total,
        "mean": total / max(1, len(not_empty)),
        **{key: _quantile(not_empty, q) for key, q in quantiles},
    }


def _quantile(ordered: np.ndarray, q: float) -> int:
    """The smallest element that is not exceeded by a share q of all."""
    return int(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) if len(ordered) else 0


def _count_duplicates(file: Path) -> int:
    """Number of 64-bit hashes in a file that equal an earlier one. Sorts the file."""
    hashes = np.memmap(file, np.uint64, "r+")
    hashes.sort()
    last = len(hashes) - 1
    return sum(
        int(np.count_nonzero(hashes[i : min(i + _BLOCK, last)] == hashes[i + 1 : i + 1 + _BLOCK]))
        for i in range(0, last, _BLOCK)
    )
