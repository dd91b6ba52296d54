"""The loader: the packs of every step, encoded ahead by worker processes, and the position to resume from.

Workers only turn (dataset, place) into tokens, a pure function; draws and packing stay in the training process. So
any number of workers gives the same packs, and nothing has to be asked of them to know the position.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from fm9g.data.encode.encoder import EncodedRecord
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.data.load.loader_state import fingerprint, migrate_state
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import PackStream, SamplingPlan
from fm9g.data.load.packing import Pack
from fm9g.errors import UserError

_CACHED_CHUNK = 256  # records that are read from a token cache at a time


def make_sampling_plan(mixture: Mixture, global_batch_size: int) -> SamplingPlan:
    """What a run with global_batch_size packs a step draws from a mixture."""
    return SamplingPlan(
        names=[config.task_name for config in mixture.configs],
        keys=mixture.keys,
        sizes=[len(dataset) for dataset in mixture.datasets],
        repeats=[config.allow_repeat for config in mixture.configs],
        proportions=mixture.proportions(),
        mean_tokens=mixture.mean_tokens(),
        num_streams=global_batch_size,
        seed=mixture.seed,
    )


class Loader:
    """Gives each rank its packs of a step, in the order of the streams."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        state: dict[str, Any] | None = None,
        allow_changes: bool = False,
    ) -> None:
        """global_batch_size: packs a step, over all ranks. prefetch: chunks a worker is ahead. state: as `state_dict()`
        gave it; allow_changes: go on from it although the samples are others.

        Raises UserError where the ranks do not divide global_batch_size, or the position belongs to other data.
        """
        if global_batch_size % world_size:
            fits = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
            raise UserError(
                f"{global_batch_size} packs a step cannot be dealt to {world_size} processes; possible: {fits}"
            )
        self._mixture = mixture
        self._fingerprint = fingerprint(mixture, global_batch_size)
        plan = make_sampling_plan(mixture, global_batch_size)
        states: dict[int, dict[str, Any]] = {}
        self.notes: list[str] = []  # what is different from what the position was made with
        if state is not None:
            states, self.notes = migrate_state(state, self._fingerprint, plan, allow_changes)
        self.is_infinite = any(repeats and share for repeats, share in zip(plan.repeats, plan.proportions))
        own = range(rank, global_batch_size, world_size)
        self._num_iterators = len(own) * len(mixture.configs)
        self._prefetch = prefetch
        self._pool = EncodingPool(mixture, 0 if all(mixture.caches) else workers)
        self._streams = {
            s: PackStream(s, plan, mixture.row_length, self._encode, self._read_ahead, states.get(s)) for s in own
        }

    def next_batch(self) -> list[Pack]:
        """This rank's packs of the next step. A pack without a sample: its stream is used up."""
        return [stream.next_pack() for stream in self._streams.values()]

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts, as JSON, with the streams of this rank (merge_states puts ranks together)."""
        return {
            "fingerprint": self._fingerprint,
            "streams": {str(s): stream.state_dict() for s, stream in self._streams.items()},
        }

    def num_started(self) -> list[int]:
        """How many records of each dataset this rank's streams have begun, over all epochs."""
        return [sum(counts) for counts in zip(*(stream.num_started() for stream in self._streams.values()))]

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

    def _encode(self, dataset: int, sample_index: int) -> EncodedRecord:
        return self._mixture.encode(dataset, [sample_index])[0]

    def _read_ahead(self, dataset: int, sample_indices: Iterator[int]) -> Iterator[tuple[int, EncodedRecord]]:
        mixture = self._mixture
        if mixture.caches[dataset]:
            while chunk := list(islice(sample_indices, _CACHED_CHUNK)):
                yield from zip(chunk, mixture.encode(dataset, chunk))
            return
        for chunk, tokens in self._pool.tokenize(dataset, sample_indices, self._num_iterators, self._prefetch):
            for sample_index, record in zip(chunk, tokens):
                yield sample_index, mixture.split_or_truncate(dataset, record)
