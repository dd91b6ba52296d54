"""A stream: one of the endless sequences of packs that a run consists of.

A run with G packs a step has G streams, whatever the number of processes; stream s makes pack s of every step. All it
does is a function of (seed, s, data), and its whole state is a few numbers for each dataset and the names of the
records that it has begun.

The next sample is from the dataset whose clock is behind. A sample of n tokens moves the clock of its dataset on by
n / (the dataset's share), so that the tokens of the datasets stay in proportion to their shares to within a sample,
whatever the lengths of their records (this is stride scheduling: Waldspurger and Weihl, 1995). Odds of drawing
from a dataset that rest on its average length would be off by as much as that average is.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import numpy as np

from fm9g.data.encode.encoder import REMEDIES, EncodedRecord
from fm9g.data.load.packing import Pack, Sample, collate
from fm9g.data.shuffle import low_discrepancy
from fm9g.errors import UserError

BUFFER_SIZE = 64  # samples that may wait for a pack they fit in
WASTE_DIVISOR = 200  # a pack with less than this part of it free is full: drawing on would only make more samples wait
MAX_IN_PROGRESS = 16  # long records of a dataset that are cut at the same time, a piece from each in turn
_PHASE_SALT = 0  # what a random number is for


@dataclass(frozen=True)
class SamplingPlan:
    """What the choice of records depends on.

    names: of the datasets. keys: a number for each name. sizes: their records. repeats: whether one starts again when
    used up. proportions: of the tokens; sum 1. mean_tokens: about how many tokens a sample has. num_streams: G.
    """

    names: list[str]
    keys: list[int]
    sizes: list[int]
    repeats: list[bool]
    proportions: list[float]
    mean_tokens: list[float]
    num_streams: int
    seed: int

    def initial_virtual_time(self, stream: int, dataset: int) -> float:
        """Where a stream's clock of a dataset starts: spread over the time a sample takes, so that the streams do not
        all turn to the dataset in the same step."""
        share = self.proportions[dataset]
        return (
            low_discrepancy(stream, self.seed, _PHASE_SALT, self.keys[dataset]) * self.mean_tokens[dataset] / share
            if share
            else 0.0
        )

    def sample_indices(self, stream: int, dataset: int, num_started: int) -> Iterator[int]:
        """The places of a dataset that a stream takes after the first `num_started`, in order; ends when it is used up.

        Stream s takes place k * G + s for k = 0, 1, ...: the streams share each epoch without talking to each other.
        """
        for k in count(num_started):
            sample_index = k * self.num_streams + stream
            if sample_index >= self.sizes[dataset] and not self.repeats[dataset]:
                return
            yield sample_index


ReadAhead = Callable[[int, Iterator[int]], Iterator[tuple[int, EncodedRecord]]]


class PackStream:
    """Makes the packs of one stream, first-fit over a bounded window of waiting samples."""

    def __init__(
        self,
        index: int,
        plan: SamplingPlan,
        row_length: int,
        encode: Callable[[int, int], EncodedRecord],
        read_ahead: ReadAhead,
        state: dict[str, Any] | None = None,
    ) -> None:
        """read_ahead: encodes a dataset's places in order, maybe elsewhere, as (place, encoded). state: as
        `state_dict()` gave it, to go on from there."""
        state = state or initial_state(index, plan)
        self._plan, self._row_length = plan, row_length
        self._max_waste = row_length // WASTE_DIVISOR
        self._virtual_times = list(state["clocks"])
        self._num_started = list(state["begun"])
        self.skipped: dict[str, int] = dict(state["skipped"])

        @cache  # many pieces of one record may wait
        def segments(dataset: int, sample_index: int) -> list[np.ndarray]:
            return encode(dataset, sample_index).segments

        self._buffer = [
            Sample(segments(d, sample_index)[segment], d, sample_index, segment)
            for d, sample_index, segment in state["waiting"]
        ]
        # Records that have begun: place, pieces, next piece.
        self._in_progress = [
            [(sample_index, segments(d, sample_index), segment) for sample_index, segment in records]
            for d, records in enumerate(state["open"])
        ]
        self._record_iterators = [
            read_ahead(d, plan.sample_indices(index, d, num_started)) for d, num_started in enumerate(self._num_started)
        ]
        self._queue = [(virtual_time, d) for d, virtual_time in enumerate(self._virtual_times) if plan.proportions[d]]
        heapq.heapify(self._queue)

    def next_pack(self) -> Pack:
        """The next pack; without a sample in it when the datasets are used up."""
        return collate(self.next_samples(), self._row_length)

    def next_samples(self) -> list[Sample]:
        """The samples of the next pack, in their order there; none when the datasets are used up."""
        chosen: list[Sample] = []
        kept: list[Sample] = []
        room = self._row_length
        for sample in self._buffer:  # oldest first, so that none waits for ever
            if len(sample.tokens) - 1 <= room:
                chosen.append(sample)
                room -= len(sample.tokens) - 1
            else:
                kept.append(sample)
        while room > self._max_waste and len(kept) < BUFFER_SIZE and (drawn := self._draw_sample()) is not None:
            if len(drawn.tokens) - 1 <= room:
                chosen.append(drawn)
                room -= len(drawn.tokens) - 1
            else:
                kept.append(drawn)
        self._buffer = kept
        return chosen

    def _draw_sample(self) -> Sample | None:
        """The next sample; None when the datasets are used up."""
        while self._queue:
            virtual_time, dataset = self._queue[0]
            sample = self._next_sample(dataset)
            if sample is None:
                heapq.heappop(self._queue)
                continue
            self._virtual_times[dataset] = virtual_time + (len(sample.tokens) - 1) / self._plan.proportions[dataset]
            heapq.heapreplace(self._queue, (self._virtual_times[dataset], dataset))
            return sample
        return None

    def _next_sample(self, dataset: int) -> Sample | None:
        """The next sample of a dataset; None when it is used up."""
        in_progress = self._in_progress[dataset]
        record = self._start_record(dataset) if len(in_progress) < MAX_IN_PROGRESS else None
        if record is None:
            if not in_progress:
                return None
            record = in_progress.pop(0)
        sample_index, segments, segment = record
        if segment + 1 < len(segments):
            in_progress.append((sample_index, segments, segment + 1))
        return Sample(segments[segment], dataset, sample_index, segment)

    def _start_record(self, dataset: int) -> tuple[int, list[np.ndarray], int] | None:
        """The dataset's next record that has a sample; None when it is used up."""
        reasons: Counter[str] = Counter()
        for num_skipped, (sample_index, encoded) in enumerate(self._record_iterators[dataset], 1):
            self._num_started[dataset] += 1
            if not encoded.skipped:
                return sample_index, encoded.segments, 0
            self.skipped[encoded.skipped] = self.skipped.get(encoded.skipped, 0) + 1
            reasons[encoded.skipped] += 1
            if num_skipped > max(1000, min(2 * self._plan.sizes[dataset], 100_000)):
                counts = [
                    f"of {count}: {reason}; {REMEDIES.get(reason, 'see its transforms')}"
                    for reason, count in reasons.most_common()
                ]
                raise UserError(
                    f"{self._plan.names[dataset]}: {num_skipped} records in a row gave nothing to train on", *counts
                )
        return None

    def num_started(self) -> list[int]:
        """Records of each dataset that have begun."""
        return list(self._num_started)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON.

        For each dataset, clocks: tokens / share so far, begun: records begun, and open: (place, next piece) of those
        that are not used up. waiting: (dataset, place, piece) of the samples that wait. skipped: records by reason.
        """
        return {
            "clocks": list(self._virtual_times),
            "begun": list(self._num_started),
            "open": [
                [[sample_index, segment] for sample_index, _, segment in records] for records in self._in_progress
            ],
            "waiting": [[sample.dataset, sample.sample_index, sample.segment] for sample in self._buffer],
            "skipped": dict(self.skipped),
        }


def initial_state(index: int, plan: SamplingPlan) -> dict[str, Any]:
    """The state of a stream at its start."""
    datasets = range(len(plan.names))
    return {
        "clocks": [plan.initial_virtual_time(index, dataset) for dataset in datasets],
        "begun": [0 for _ in datasets],
        "open": [[] for _ in datasets],
        "waiting": [],
        "skipped": {},
    }
