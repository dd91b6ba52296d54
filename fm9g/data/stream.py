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

from fm9g.data.encode import REMEDIES, Encoded
from fm9g.data.order import spread
from fm9g.data.pack import Pack, Sample, collate
from fm9g.errors import UserError

WINDOW = 64  # samples that may wait for a pack they fit in
ENOUGH = 200  # a pack with less than this part of it free is full: drawing on would only make more samples wait
OPEN = 16  # long records of a dataset that are cut at the same time, a piece from each in turn
_PHASE = 0  # what a random number is for


@dataclass(frozen=True)
class Plan:
    """What the choice of records depends on.

    names: of the datasets. keys: a number for each name. sizes: their records. repeats: whether one starts again when
    used up. shares: of the tokens; sum 1. means: about how many tokens a sample has. streams: G.
    """

    names: list[str]
    keys: list[int]
    sizes: list[int]
    repeats: list[bool]
    shares: list[float]
    means: list[float]
    streams: int
    seed: int

    def first_clock(self, stream: int, dataset: int) -> float:
        """Where a stream's clock of a dataset starts: spread over the time a sample takes, so that the streams do not
        all turn to the dataset in the same step."""
        share = self.shares[dataset]
        return spread(stream, self.seed, _PHASE, self.keys[dataset]) * self.means[dataset] / share if share else 0.0

    def places(self, stream: int, dataset: int, begun: int) -> Iterator[int]:
        """The places of a dataset that a stream takes after the first `begun`, in order; ends when it is used up.

        Stream s takes place k * G + s for k = 0, 1, ...: the streams share each epoch without talking to each other.
        """
        for k in count(begun):
            place = k * self.streams + stream
            if place >= self.sizes[dataset] and not self.repeats[dataset]:
                return
            yield place


ReadAhead = Callable[[int, Iterator[int]], Iterator[tuple[int, Encoded]]]


class Stream:
    """Makes the packs of one stream, first-fit over a bounded window of waiting samples."""

    def __init__(
        self,
        index: int,
        plan: Plan,
        capacity: int,
        encode: Callable[[int, int], Encoded],
        read_ahead: ReadAhead,
        state: dict[str, Any] | None = None,
    ) -> None:
        """read_ahead: encodes a dataset's places in order, maybe elsewhere, as (place, encoded). state: as `state()`
        gave it, to go on from there."""
        state = state or new_state(index, plan)
        self._plan, self._capacity = plan, capacity
        self._enough = capacity // ENOUGH
        self._clocks = list(state["clocks"])
        self._begun = list(state["begun"])
        self.skipped: dict[str, int] = dict(state["skipped"])

        @cache  # many pieces of one record may wait
        def pieces(dataset: int, place: int) -> list[np.ndarray]:
            return encode(dataset, place).pieces

        self._waiting = [Sample(pieces(d, place)[piece], d, place, piece) for d, place, piece in state["waiting"]]
        # Records that have begun: place, pieces, next piece.
        self._open = [
            [(place, pieces(d, place), piece) for place, piece in records] for d, records in enumerate(state["open"])
        ]
        self._records = [read_ahead(d, plan.places(index, d, begun)) for d, begun in enumerate(self._begun)]
        self._due = [(clock, d) for d, clock in enumerate(self._clocks) if plan.shares[d]]
        heapq.heapify(self._due)

    def next_pack(self) -> Pack:
        """The next pack; without a sample in it when the datasets are used up."""
        return collate(self.next_samples(), self._capacity)

    def next_samples(self) -> list[Sample]:
        """The samples of the next pack, in their order there; none when the datasets are used up."""
        chosen: list[Sample] = []
        kept: list[Sample] = []
        room = self._capacity
        for sample in self._waiting:  # oldest first, so that none waits for ever
            if len(sample.tokens) - 1 <= room:
                chosen.append(sample)
                room -= len(sample.tokens) - 1
            else:
                kept.append(sample)
        while room > self._enough and len(kept) < WINDOW and (drawn := self._draw()) is not None:
            if len(drawn.tokens) - 1 <= room:
                chosen.append(drawn)
                room -= len(drawn.tokens) - 1
            else:
                kept.append(drawn)
        self._waiting = kept
        return chosen

    def _draw(self) -> Sample | None:
        """The next sample; None when the datasets are used up."""
        while self._due:
            clock, dataset = self._due[0]
            sample = self._next_sample(dataset)
            if sample is None:
                heapq.heappop(self._due)
                continue
            self._clocks[dataset] = clock + (len(sample.tokens) - 1) / self._plan.shares[dataset]
            heapq.heapreplace(self._due, (self._clocks[dataset], dataset))
            return sample
        return None

    def _next_sample(self, dataset: int) -> Sample | None:
        """The next sample of a dataset; None when it is used up."""
        begun = self._open[dataset]
        record = self._begin_record(dataset) if len(begun) < OPEN else None
        if record is None:
            if not begun:
                return None
            record = begun.pop(0)
        place, pieces, piece = record
        if piece + 1 < len(pieces):
            begun.append((place, pieces, piece + 1))
        return Sample(pieces[piece], dataset, place, piece)

    def _begin_record(self, dataset: int) -> tuple[int, list[np.ndarray], int] | None:
        """The dataset's next record that has a sample; None when it is used up."""
        reasons: Counter[str] = Counter()
        for barren, (place, encoded) in enumerate(self._records[dataset], 1):
            self._begun[dataset] += 1
            if not encoded.skipped:
                return place, encoded.pieces, 0
            self.skipped[encoded.skipped] = self.skipped.get(encoded.skipped, 0) + 1
            reasons[encoded.skipped] += 1
            if barren > max(1000, min(2 * self._plan.sizes[dataset], 100_000)):
                counts = [
                    f"of {count}: {reason}; {REMEDIES.get(reason, 'see its transforms')}"
                    for reason, count in reasons.most_common()
                ]
                raise UserError(
                    f"{self._plan.names[dataset]}: {barren} records in a row gave nothing to train on", *counts
                )
        return None

    def begun(self) -> list[int]:
        """Records of each dataset that have begun."""
        return list(self._begun)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON.

        For each dataset, clocks: tokens / share so far, begun: records begun, and open: (place, next piece) of those
        that are not used up. waiting: (dataset, place, piece) of the samples that wait. skipped: records by reason.
        """
        return {
            "clocks": list(self._clocks),
            "begun": list(self._begun),
            "open": [[[place, piece] for place, _, piece in records] for records in self._open],
            "waiting": [[sample.dataset, sample.place, sample.piece] for sample in self._waiting],
            "skipped": dict(self.skipped),
        }


def new_state(index: int, plan: Plan) -> dict[str, Any]:
    """The state of a stream at its start."""
    datasets = range(len(plan.names))
    return {
        "clocks": [plan.first_clock(index, dataset) for dataset in datasets],
        "begun": [0 for _ in datasets],
        "open": [[] for _ in datasets],
        "waiting": [],
        "skipped": {},
    }
