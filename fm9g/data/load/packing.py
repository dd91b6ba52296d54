"""Packing: samples laid end to end in one row, so that almost no position is padding.

A sample of n + 1 tokens fills n positions: its first n tokens are inputs, its last n are their targets. Two samples,
<s> a b c </s> with a masked and <s> d </s>, in a row of 8:

                   ┌── sample 1 ─────┐ ┌─ 2 ──┐ ┌─ padding
    input_ids     <s>   a    b    c   <s>   d    0    0
    targets      -100   b    c  </s>    d </s> -100 -100       -100: no loss
    positions       0   1    2    3     0   1    0    1
    task_ids        0   0    0    0     1   1   -1   -1
    cu_seqlens      0                   4        6         8   borders of the spans, for attention
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fm9g.data.encode.token_array import is_weighted, loss_weights, token_ids

IGNORE_INDEX = -100  # a target that counts for no loss


class Sample(NamedTuple):
    """One sample: its token array of shape (n + 1,), and its origin: dataset, sample index, segment of the record."""

    tokens: np.ndarray
    dataset: int
    sample_index: int
    segment: int

    @property
    def length(self) -> int:
        """Positions that the sample fills: n."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Pack:
    """One row of T positions. The padding at its end is a span of its own, with targets -100 and task_ids -1.

    Args:
        input_ids: (T,) int32.
        targets: (T,) int32, the next token; -100 where it counts for no loss.
        positions: (T,) int32; restart at 0 in each span.
        cu_seqlens: (spans + 1,) int32, the borders of the spans: 0 ... T.
        task_ids: (T,) int32, the dataset of each position.
        target_weights: (T,) float32, each target's weight in the loss; None if all are 1.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    task_ids: np.ndarray
    target_weights: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """Positions that hold a sample's token."""
        return int((self.task_ids >= 0).sum())

    @property
    def target_tokens(self) -> int:
        """Positions that count for the loss."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def total_weight(self) -> float:
        """The sum of the targets' weights: their number, if all are 1."""
        return self.target_tokens if self.target_weights is None else float(self.target_weights.sum(dtype=np.float64))


def collate(samples: list[Sample], row_length: int) -> Pack:
    """Lays samples end to end in a row of `row_length` positions, which must hold them all."""
    lengths = np.array([sample.length for sample in samples], np.int64)
    ends = np.cumsum(lengths)
    used = int(ends[-1]) if samples else 0
    assert used <= row_length
    input_ids, targets = np.zeros(row_length, np.int32), np.full(row_length, IGNORE_INDEX, np.int32)
    positions, task_ids = np.arange(row_length, dtype=np.int32), np.full(row_length, -1, np.int32)
    weights = None
    if samples:
        input_ids[:used] = token_ids(np.concatenate([sample.tokens[:-1] for sample in samples]))
        following = np.concatenate([sample.tokens[1:] for sample in samples])
        targets[:used] = np.where(following >= 0, token_ids(following), IGNORE_INDEX)
        if is_weighted(following):
            weights = np.zeros(row_length, np.float32)
            weights[:used] = loss_weights(following)
        task_ids[:used] = np.repeat([sample.dataset for sample in samples], lengths)
        positions[:used] -= np.repeat(ends - lengths, lengths)
    positions[used:] -= used
    borders = [0, *ends.tolist(), *([row_length] if used < row_length else [])]
    return Pack(input_ids, targets, positions, np.array(borders, np.int32), task_ids, weights)
