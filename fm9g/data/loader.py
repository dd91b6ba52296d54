"""The loader: the packs of every step, encoded ahead by worker processes, and the position to resume from.

Workers only turn (dataset, place) into tokens, a pure function; draws and packing stay in the training process. So
any number of workers gives the same packs, and nothing has to be asked of them to know the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from fm9g.data.encode import Encoded
from fm9g.data.mixture import Mixture
from fm9g.data.pack import Pack
from fm9g.data.pool import EncodingPool
from fm9g.data.position import carried_on, fingerprint
from fm9g.data.stream import Plan, Stream
from fm9g.errors import UserError

_CACHED = 256  # records that are read from a token cache at a time


def make_plan(mixture: Mixture, global_batch: int) -> Plan:
    """What a run with global_batch packs a step draws from a mixture."""
    return Plan(
        names=[config.task_name for config in mixture.configs],
        keys=mixture.keys,
        sizes=[len(dataset) for dataset in mixture.datasets],
        repeats=[config.allow_repeat for config in mixture.configs],
        shares=mixture.shares(),
        means=mixture.mean_tokens(),
        streams=global_batch,
        seed=mixture.seed,
    )


class Loader:
    """Gives each rank its packs of a step, in the order of the streams."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        position: dict[str, Any] | None = None,
        carry: bool = False,
    ) -> None:
        """global_batch: packs a step, over all ranks. prefetch: chunks a worker is ahead. position: as `position()`
        gave it; carry: go on from it although the samples are others.

        Raises UserError where the ranks do not divide global_batch, or the position belongs to other data.
        """
        if global_batch % world_size:
            fits = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            raise UserError(f"{global_batch} packs a step cannot be dealt to {world_size} processes; possible: {fits}")
        self._mixture = mixture
        self._fingerprint = fingerprint(mixture, global_batch)
        plan = make_plan(mixture, global_batch)
        states: dict[int, dict[str, Any]] = {}
        self.notes: list[str] = []  # what is different from what the position was made with
        if position is not None:
            states, self.notes = carried_on(position, self._fingerprint, plan, carry)
        self.endless = any(repeats and share for repeats, share in zip(plan.repeats, plan.shares))
        own = range(rank, global_batch, world_size)
        self._sequences = len(own) * len(mixture.configs)
        self._prefetch = prefetch
        self._pool = EncodingPool(mixture, 0 if all(mixture.caches) else workers)
        self._streams = {
            s: Stream(s, plan, mixture.capacity, self._encode, self._read_ahead, states.get(s)) for s in own
        }

    def next_step(self) -> list[Pack]:
        """This rank's packs of the next step. A pack without a sample: its stream is used up."""
        return [stream.next_pack() for stream in self._streams.values()]

    def position(self) -> dict[str, Any]:
        """Where the next step starts, as JSON, with the streams of this rank (merge_positions puts ranks together)."""
        return {
            "fingerprint": self._fingerprint,
            "streams": {str(s): stream.state() for s, stream in self._streams.items()},
        }

    def begun(self) -> list[int]:
        """How many records of each dataset this rank's streams have begun, over all epochs."""
        return [sum(counts) for counts in zip(*(stream.begun() for stream in self._streams.values()))]

    def skipped(self) -> dict[str, int]:
        """How many records gave no sample, by reason."""
        total: dict[str, int] = {}
        for stream in self._streams.values():
            for reason, count in stream.skipped.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, dataset: int, place: int) -> Encoded:
        return self._mixture.encode(dataset, [place])[0]

    def _read_ahead(self, dataset: int, places: Iterator[int]) -> Iterator[tuple[int, Encoded]]:
        mixture = self._mixture
        if mixture.caches[dataset]:
            while chunk := list(islice(places, _CACHED)):
                yield from zip(chunk, mixture.encode(dataset, chunk))
            return
        for chunk, tokens in self._pool.tokens(dataset, places, self._sequences, self._prefetch):
            for place, record in zip(chunk, tokens):
                yield place, mixture.cut(dataset, record)
