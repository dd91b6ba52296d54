"""Packing: samples laid end to end in one row, so that almost no position is spent on padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fm9g.data.encode import IGNORED


@dataclass(frozen=True)
class Sample:
    """One sample: ids and targets (n,), the dataset it is from, and what it is re-encoded from on resume."""

    ids: np.ndarray
    targets: np.ndarray
    dataset: int
    place: int
    piece: int


@dataclass(frozen=True)
class Pack:
    """One row of T tokens. The unused tail is a span of its own, with targets -100 and task_ids -1.

    input_ids, targets, positions, task_ids: (T,) int32; positions restart at 0 in each sample.
    cu_seqlens: (spans + 1,) int32, the borders of the spans: 0 ... T.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    task_ids: np.ndarray

    @property
    def tokens(self) -> int:
        """Positions that hold a sample's token."""
        return int((self.task_ids >= 0).sum())

    @property
    def target_tokens(self) -> int:
        """Positions that count for the loss."""
        return int((self.targets != IGNORED).sum())


def collate(samples: list[Sample], capacity: int) -> Pack:
    """Lays samples end to end in a row of `capacity` tokens, which they must fit in."""
    lengths = [len(sample.ids) for sample in samples]
    used = sum(lengths)
    assert used <= capacity
    input_ids, targets = np.zeros(capacity, np.int32), np.full(capacity, IGNORED, np.int32)
    positions, task_ids = np.zeros(capacity, np.int32), np.full(capacity, -1, np.int32)
    start = 0
    for sample, length in zip(samples, lengths):
        span = slice(start, start + length)
        input_ids[span], targets[span], task_ids[span] = sample.ids, sample.targets, sample.dataset
        positions[span] = np.arange(length)
        start += length
    positions[used:] = np.arange(capacity - used)
    tail = [capacity - used] if used < capacity else []
    cu_seqlens = np.cumsum([0, *lengths, *tail], dtype=np.int32)
    return Pack(input_ids, targets, positions, cu_seqlens, task_ids)
