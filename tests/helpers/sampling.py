"""Sampling plans and record sources without any file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fm9g.data.encode.oversize import EncodedRecord
from fm9g.data.load.record_source import RecordSource
from fm9g.data.load.sampling_plan import SamplingPlan


def make_plan(
    sizes: list[int], streams: int, repeats: list[bool] | None = None, proportions: list[float] | None = None
) -> SamplingPlan:
    count = len(sizes)
    names = [f"task{i}" for i in range(count)]
    proportions = proportions or [1 / count] * count
    return SamplingPlan(
        names, [*range(count)], sizes, repeats or [True] * count, proportions, [30.0] * count, streams, seed=7
    )


class FunctionSource(RecordSource):
    """The records that a function of (dataset, sample index) returns."""

    chunk_size = 1  # endless datasets of records that give nothing are read only as far as the stream asks

    def __init__(self, function: Callable[[int, int], EncodedRecord]) -> None:
        self._function = function

    def encode(self, dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        return [self._function(dataset, sample_index) for sample_index in sample_indices]
