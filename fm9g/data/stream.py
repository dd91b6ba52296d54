"""A stream: one of the endless sequences of packs that a run consists of.

A run with G packs a step has G streams, whatever the number of processes; stream s makes pack s of every step. All it
does is a function of (seed, s, data): each sample's dataset comes from a low-discrepancy sequence, its record from the
dataset's sequence of epochs. So its whole state is a few counts and the names of the records that it has begun.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count
from typing import Any

from fm9g.data.encode import Encoded
from fm9g.data.order import spread
from fm9g.data.pack import Pack, Sample, collate
from fm9g.errors import UserError

WINDOW = 64  # samples that may wait for a pack they fit in
OPEN = 16  # long records of a dataset that are cut at the same time, a piece from each in turn
_PICK = 0  # what a random number is for


@dataclass(frozen=True)
class Odds:
    """What the choice of records depends on.

    names: of the datasets. sizes: their records. repeats: whether one starts again when used up. chances: the odds
    that the next sample is from it. streams: G.
    """

    names: list[str]
    sizes: list[int]
    repeats: list[bool]
    chances: list[float]
    streams: int
    seed: int

    def pick(self, stream: int, number: int, candidates: list[int]) -> int:
        """The dataset, among the candidates, of a stream's sample `number`."""
        cumulative = list(accumulate(self.chances[d] for d in candidates))
        point = spread(number, self.seed, _PICK, stream) * cumulative[-1]
        return candidates[min(bisect_right(cumulative, point), len(candidates) - 1)]

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
        odds: Odds,
        capacity: int,
        encode: Callable[[int, int], Encoded],
        read_ahead: ReadAhead,
        state: dict[str, Any] | None = None,
    ) -> None:
        """read_ahead: encodes a dataset's places in order, maybe elsewhere, as (place, encoded). state: as `state()`
        gave it, to go on from there."""
        datasets = range(len(odds.sizes))
        state = state or {"picks": 0, "begun": [0 for _ in datasets], "open": [[] for _ in datasets], "waiting": []}
        self._index, self._odds, self._capacity = index, odds, capacity
        self._picks: int = state["picks"]
        self._begun: list[int] = list(state["begun"])
        self.skipped: dict[str, int] = dict(state.get("skipped", {}))

        @cache  # many pieces of one record may wait
        def pieces(dataset: int, place: int) -> list[Sample]:
            return _samples(dataset, place, encode(dataset, place))

        self._waiting = [pieces(dataset, place)[piece] for dataset, place, piece in state["waiting"]]
        self._open = [[pieces(d, place)[piece:] for place, piece in state["open"][d]] for d in datasets]
        self._records = [read_ahead(d, odds.places(index, d, self._begun[d])) for d in datasets]

    def next_pack(self) -> Pack:
        """The next pack; without a sample in it when the datasets are used up."""
        chosen: list[Sample] = []
        kept: list[Sample] = []
        room = self._capacity
        for sample in self._waiting:  # oldest first, so that none waits for ever
            if len(sample.ids) <= room:
                chosen.append(sample)
                room -= len(sample.ids)
            else:
                kept.append(sample)
        while room and len(kept) < WINDOW and (drawn := self._draw()) is not None:
            if len(drawn.ids) <= room:
                chosen.append(drawn)
                room -= len(drawn.ids)
            else:
                kept.append(drawn)
        self._waiting = kept
        return collate(chosen, self._capacity)

    def _draw(self) -> Sample | None:
        """The next sample; None when the datasets are used up."""
        while candidates := [d for d in range(len(self._begun)) if self._has_more(d)]:
            dataset = self._odds.pick(self._index, self._picks, candidates)
            self._picks += 1
            open_records = self._open[dataset]
            fresh = self._begin_record(dataset) if len(open_records) < OPEN else None
            if fresh or open_records:  # else its last records were all skipped
                sample, *rest = fresh or open_records.pop(0)
                if rest:
                    open_records.append(rest)
                return sample
        return None

    def _has_more(self, dataset: int) -> bool:
        odds = self._odds
        unused = self._begun[dataset] * odds.streams + self._index < odds.sizes[dataset]
        return odds.chances[dataset] > 0 and (odds.repeats[dataset] or unused or bool(self._open[dataset]))

    def _begin_record(self, dataset: int) -> list[Sample] | None:
        """The pieces of the dataset's next record that has any; None when it is used up."""
        for barren, (place, encoded) in enumerate(self._records[dataset], 1):
            self._begun[dataset] += 1
            if not encoded.skipped:
                return _samples(dataset, place, encoded)
            self.skipped[encoded.skipped] = self.skipped.get(encoded.skipped, 0) + 1
            if barren > max(1000, min(2 * self._odds.sizes[dataset], 100_000)):
                raise UserError(
                    f"{self._odds.names[dataset]}: {barren} records in a row gave nothing to train on (the last one: "
                    f"{encoded.skipped}); see its transforms, oversize_rule and max_length"
                )
        return None

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON.

        picks: samples drawn. For each dataset, begun: records begun, and open: (place, next piece) of those that are
        not used up. waiting: (dataset, place, piece) of the samples that wait. skipped: records by reason.
        """
        return {
            "picks": self._picks,
            "begun": list(self._begun),
            "open": [[[pieces[0].place, pieces[0].piece] for pieces in records] for records in self._open],
            "waiting": [[sample.dataset, sample.place, sample.piece] for sample in self._waiting],
            "skipped": dict(self.skipped),
        }


def _samples(dataset: int, place: int, encoded: Encoded) -> list[Sample]:
    return [Sample(ids, targets, dataset, place, n) for n, (ids, targets) in enumerate(encoded.pieces)]
