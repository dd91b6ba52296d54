"""A stream: one of the endless sequences of packs that a run consists of.

A run with G packs a step has G streams, whatever the number of processes; stream s makes pack s of every step. Which
records it draws is a pure function of (seed, s, number of draws), so its whole state is a count a dataset and the
names of the samples that wait for a pack they fit in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fm9g.data.encode import Encoded
from fm9g.data.order import spread
from fm9g.data.pack import Pack, Sample, collate
from fm9g.errors import UserError

WINDOW = 64  # samples that may wait for a pack they fit in
_PICK = 0  # what a random number is for

Draw = tuple[int, int]  # dataset, place


@dataclass(frozen=True)
class Odds:
    """What the choice of records depends on.

    names: of the datasets. sizes: their records. repeats: whether one starts again when used up. chances: the odds
    that the next record is from it. streams: G.
    """

    names: list[str]
    sizes: list[int]
    repeats: list[bool]
    chances: list[float]
    streams: int
    seed: int

    def draws(self, stream: int, counts: list[int]) -> Iterator[Draw]:
        """The records that a stream draws after `counts` draws of each dataset; ends when all are used up.

        With k draws of dataset d behind it, stream s takes place k * G + s of d's endless sequence: the streams
        share each epoch without talking to each other.
        """
        counts = list(counts)
        number = sum(counts)
        open_before: list[int] = []
        while True:
            places = [count * self.streams + stream for count in counts]
            still_open = [
                d
                for d, chance in enumerate(self.chances)
                if chance > 0 and (self.repeats[d] or places[d] < self.sizes[d])
            ]
            if not still_open:
                return
            if still_open != open_before:
                cumulative = list(accumulate(self.chances[d] for d in still_open))
                open_before = still_open
            point = spread(number, self.seed, _PICK, stream) * cumulative[-1]
            dataset = still_open[min(bisect_right(cumulative, point), len(still_open) - 1)]
            yield dataset, places[dataset]
            counts[dataset] += 1
            number += 1


class Stream:
    """Makes the packs of one stream, first-fit over a bounded window of waiting samples."""

    def __init__(
        self,
        index: int,
        odds: Odds,
        capacity: int,
        encode: Callable[[int, int], Encoded],
        read_ahead: Callable[[Iterator[Draw]], Iterator[tuple[Draw, Encoded]]],
        state: dict[str, Any] | None = None,
    ) -> None:
        """state: as `state()` gave it, to go on from there. read_ahead: encodes draws in order, maybe elsewhere."""
        state = state or {"draws": [0] * len(odds.sizes), "waiting": [], "skipped": {}}
        self._odds, self._capacity = odds, capacity
        self._counts: list[int] = list(state["draws"])
        self._skipped: dict[str, int] = dict(state["skipped"])
        self._waiting: list[Sample] = []
        for dataset, place, first, last in state["waiting"]:
            pieces = _samples((dataset, place), encode(dataset, place))
            self._waiting += pieces[first : last + 1]
        self._encoded = read_ahead(odds.draws(index, self._counts))
        self._barren = [0] * len(odds.sizes)  # records in a row that gave no sample

    def next_pack(self) -> Pack:
        """The next pack; without a sample in it when the datasets are used up."""
        chosen: list[Sample] = []
        room = self._capacity
        candidates, self._waiting = self._waiting, []
        while True:
            for sample in candidates:  # oldest first, so that none waits for ever
                if len(sample.ids) <= room:
                    chosen.append(sample)
                    room -= len(sample.ids)
                else:
                    self._waiting.append(sample)
            if room == 0 or len(self._waiting) >= WINDOW:
                break
            drawn = self._draw()
            if drawn is None:
                break
            candidates = drawn
        return collate(chosen, self._capacity)

    def _draw(self) -> list[Sample] | None:
        """The samples of the next record; none where it is skipped; None when the datasets are used up."""
        draw, encoded = next(self._encoded, (None, None))
        if draw is None or encoded is None:
            return None
        self._counts[draw[0]] += 1
        if encoded.skipped:
            self._skipped[encoded.skipped] = self._skipped.get(encoded.skipped, 0) + 1
            self._check_barren(draw[0], encoded.skipped)
        else:
            self._barren[draw[0]] = 0
        return _samples(draw, encoded)

    def _check_barren(self, dataset: int, reason: str) -> None:
        self._barren[dataset] += 1
        if self._barren[dataset] > max(1000, min(2 * self._odds.sizes[dataset], 100_000)):
            raise UserError(
                f"{self._odds.names[dataset]}: {self._barren[dataset]} records in a row gave nothing to "
                f"train on (the last one: {reason}); see its transforms, oversize_rule and max_length"
            )

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: draws of each dataset, waiting samples as (dataset, place, first and last
        segment), and how many records were skipped for which reason."""
        waiting: list[list[int]] = []
        for sample in self._waiting:
            if waiting and waiting[-1][:2] == [sample.dataset, sample.place] and waiting[-1][3] == sample.segment - 1:
                waiting[-1][3] = sample.segment
            else:
                waiting.append([sample.dataset, sample.place, sample.segment, sample.segment])
        return {"draws": list(self._counts), "waiting": waiting, "skipped": dict(self._skipped)}


def _samples(draw: Draw, encoded: Encoded) -> list[Sample]:
    dataset, place = draw
    return [Sample(ids, targets, dataset, place, n) for n, (ids, targets) in enumerate(encoded.pieces)]
