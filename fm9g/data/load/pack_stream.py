"""A pack stream: one of the endless sequences of packs that a run consists of.

A run with G packs per step has G streams, whatever the number of processes; stream s fills pack s of every step. A
stream is a function of (seed, s, data), and its state is a few numbers per dataset and the names of unfinished records.
Samples below are dataset, sample index and segment:

    dataset   share   virtual time   records in progress (next segment / segments)   next sample index
    A          0.7         310       12 (3/9), 40 (1/4)                               44
    B          0.3         295       none                                             17
                            │
                            ▼   the dataset with the smallest virtual time gives the next sample: B 17.0
    buffer    [A 12.2] [B 5.0]      samples that fitted into no pack yet, oldest first
                            │
                            ▼   first fit
    pack      | A 12.1 | B 16.0 | A 40.0 | padding |

The virtual time of a dataset advances by n / share for a sample of n tokens. So the tokens of all datasets stay in
proportion to their shares to within one sample, whatever the lengths of their records (stride scheduling: Waldspurger
and Weihl, 1995). Random draws weighted by the average length would be wrong by as much as that average is.
"""

from __future__ import annotations

import heapq
from collections import Counter
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fm9g.data.encode.oversize import REMEDIES
from fm9g.data.load.packing import Sample
from fm9g.data.load.record_source import RecordSource
from fm9g.data.load.sampling_plan import SamplingPlan
from fm9g.errors import UserError

BUFFER_SIZE = 64  # samples that may wait for a pack they fit in
WASTE_DIVISOR = 200  # a pack counts as full when less than 1/200 of it is free: more draws would only fill the buffer
MAX_IN_PROGRESS = 16  # long records of a dataset that are segmented at the same time, one segment from each in turn


class _Record(NamedTuple):
    """A record in progress: its segments, and which of them is next."""

    sample_index: int
    segments: list[np.ndarray]
    next_segment: int


class PackStream:
    """Chooses the samples of each pack of one stream: first fit over a bounded buffer."""

    def __init__(
        self,
        index: int,
        plan: SamplingPlan,
        row_length: int,
        source: RecordSource,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Opens stream `index` of a plan.

        Args:
            row_length: tokens per pack.
            source: where records are read from.
            state: from `state_dict()`, to resume there.
        """
        state = state or initial_state(index, plan)
        self._index, self._plan, self._row_length = index, plan, row_length
        self._max_samples = plan.samples_per_pack or row_length
        self._num_packs = state.get("packs", 0)
        self._fruitless: Counter[str] = Counter()  # records in a row without a sample, by reason
        self._max_waste = row_length // WASTE_DIVISOR
        self._virtual_times = list(state["clocks"])
        self._num_started = list(state["begun"])
        self.skipped: dict[str, int] = dict(state["skipped"])

        @cache  # many segments of one record may be in the buffer
        def segments(dataset: int, sample_index: int) -> list[np.ndarray]:
            return source.encode(dataset, [sample_index])[0].segments

        self._buffer = [
            Sample(segments(d, sample_index)[segment], d, sample_index, segment)
            for d, sample_index, segment in state["waiting"]
        ]
        self._in_progress = [
            [_Record(sample_index, segments(d, sample_index), segment) for sample_index, segment in records]
            for d, records in enumerate(state["open"])
        ]
        self._record_iterators = [
            source.read_ahead(d, plan.sample_indices(index, d, num_started))
            for d, num_started in enumerate(self._num_started)
        ]
        self._queue = [(virtual_time, d) for d, virtual_time in enumerate(self._virtual_times) if plan.proportions[d]]
        heapq.heapify(self._queue)

    def next_samples(self) -> list[Sample]:
        """The samples of the next pack, in their order there; none when the datasets are used up."""
        return self._next_slots() if self._plan.concat_order else self._next_fitting()

    def _next_slots(self) -> list[Sample]:
        """The samples of the records in the slots of the next pack.

        Records that give several samples fill a buffer, which is emptied before further records are started.
        """
        order = self._plan.concat_order
        assert order
        while len(self._buffer) < self._max_samples:
            for dataset in order.slots(self._index, self._num_packs):
                for sample_index, encoded in islice(self._record_iterators[dataset], 1):
                    self._num_started[dataset] += 1
                    self._buffer += [
                        Sample(segment, dataset, sample_index, number)
                        for number, segment in enumerate(encoded.segments)
                    ]
                    self._count_skipped(dataset, encoded.skipped, self._fruitless)
            self._num_packs += 1
            if self._buffer or self._plan.has_empty_packs or self._num_packs >= order.steps_per_epoch:
                break  # otherwise, the pack would be empty before the end of the data
        chosen: list[Sample] = []
        free = self._row_length
        while self._buffer and len(chosen) < self._max_samples and self._buffer[0].length <= free:
            chosen.append(self._buffer.pop(0))
            free -= chosen[-1].length
        return chosen

    def _next_fitting(self) -> list[Sample]:
        """First fit over the buffer, then over new samples."""
        chosen: list[Sample] = []
        waiting: list[Sample] = []
        free = self._row_length
        for sample in self._buffer:  # oldest first, so that none waits forever
            if sample.length <= free and len(chosen) < self._max_samples:
                chosen.append(sample)
                free -= sample.length
            else:
                waiting.append(sample)
        while (
            free > self._max_waste
            and len(chosen) < self._max_samples
            and len(waiting) < BUFFER_SIZE
            and (drawn := self._draw_sample()) is not None
        ):
            if drawn.length <= free:
                chosen.append(drawn)
                free -= drawn.length
            else:
                waiting.append(drawn)
        self._buffer = waiting
        return chosen

    def _draw_sample(self) -> Sample | None:
        """Draws from the dataset with the smallest virtual time; None when all datasets are used up."""
        while self._queue:
            virtual_time, dataset = self._queue[0]
            sample = self._next_sample(dataset)
            if sample is None:
                heapq.heappop(self._queue)
                continue
            self._virtual_times[dataset] = virtual_time + sample.length / self._plan.proportions[dataset]
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
            in_progress.append(_Record(sample_index, segments, segment + 1))
        return Sample(segments[segment], dataset, sample_index, segment)

    def _start_record(self, dataset: int) -> _Record | None:
        """The dataset's next record that has a sample; None when it is used up."""
        reasons: Counter[str] = Counter()
        for sample_index, encoded in self._record_iterators[dataset]:
            self._num_started[dataset] += 1
            self._count_skipped(dataset, encoded.skipped, reasons)
            if not encoded.skipped:
                return _Record(sample_index, encoded.segments, 0)
        return None

    def _count_skipped(self, dataset: int, reason: str, reasons: Counter[str]) -> None:
        """Counts a record that gave no sample. Raises UserError if too many did in a row.

        Args:
            reason: why it gave none; empty: it gave one.
            reasons: those of the records before it.
        """
        if not reason:
            reasons.clear()
            return
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        reasons[reason] += 1
        if (num_read := reasons.total()) > max(1000, min(2 * self._plan.sizes[dataset], 100_000)):
            counts = [
                f"of {count}: {reason}; {REMEDIES.get(reason, 'see its transforms')}"
                for reason, count in reasons.most_common()
            ]
            raise UserError(
                f"{self._plan.names[dataset]}: {num_read} records in a row gave nothing to train on", *counts
            )

    def num_started(self) -> list[int]:
        """Records started, per dataset and over all epochs."""
        return list(self._num_started)

    def state_dict(self) -> dict[str, Any]:
        """The stream's state as JSON.

        Lists with one entry per dataset:
            clocks: its virtual time.
            begun: records started.
            open: [sample index, next segment] of the records in progress.
        For the stream:
            waiting: [dataset, sample index, segment] of the samples in the buffer, oldest first.
            skipped: number of records that gave no sample, by reason.
            packs: without packing, the number of packs whose records were started.
        """
        packs = {"packs": self._num_packs} if self._plan.concat_order else {}
        return packs | {
            "clocks": list(self._virtual_times),
            "begun": list(self._num_started),
            "open": [
                [[record.sample_index, record.next_segment] for record in records] for records in self._in_progress
            ],
            "waiting": [[sample.dataset, sample.sample_index, sample.segment] for sample in self._buffer],
            "skipped": dict(self.skipped),
        }


def initial_state(index: int, plan: SamplingPlan) -> dict[str, Any]:
    """The state of a stream before its first pack."""
    datasets = range(len(plan.names))
    return {
        "clocks": [plan.initial_virtual_time(index, dataset) for dataset in datasets],
        "begun": [0 for _ in datasets],
        "open": [[] for _ in datasets],
        "waiting": [],
        "skipped": {},
    }
