"""The loader: each rank's packs of every step, encoded ahead by worker processes, and the state to resume from.

A run with G packs per step has G streams; rank r of R owns those with s mod R = r. For G = 8 and R = 4:

    stream           0   1   2   3   4   5   6   7
    rank             0   1   2   3   0   1   2   3
    micro-batch      0   0   0   0   1   1   1   1      of the step, on its rank

Pack s of a step comes from stream s. So another number of ranks that divides G gives the same packs, and so does any
number of workers: these only compute a pure function, from (dataset, sample index) to tokens, while the training
process draws and packs. The state of the streams is therefore the complete state of the loader.
"""

from __future__ import annotations

from typing import Any

from fm9g.data.load.loader_state import fingerprint, migrate_state
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import PackStream
from fm9g.data.load.packing import Pack, Sample, collate
from fm9g.data.load.record_source import MixtureSource
from fm9g.data.load.sampling_plan import make_sampling_plan
from fm9g.errors import UserError

ROW_MULTIPLE = 64  # few lengths of rows, so that kernels are chosen and memory is reserved for few


def trimmed_length(num_tokens: int, multiple: int = ROW_MULTIPLE) -> int:
    """Positions of a row without packing: the tokens of its samples, rounded up to a multiple."""
    return -(-max(1, num_tokens) // multiple) * multiple


class Loader:
    """Gives a rank its packs of each step, in the order of its streams."""

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
        row_multiple: int = ROW_MULTIPLE,
    ) -> None:
        """Opens the streams of a rank.

        Args:
            global_batch_size: packs per step, over all ranks.
            workers: processes that encode records; 0: encode in this process.
            prefetch: chunks of records that each worker is ahead.
            state: from `state_dict()`, merged over all ranks, to resume there.
            allow_changes: resume even if the data gives other samples than before.
            row_multiple: without packing, rows are as long as their samples, rounded up to a multiple of this.

        Raises UserError if global_batch_size is no multiple of world_size, or the state belongs to other data.
        """
        if global_batch_size % world_size:
            divisors = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
            raise UserError(
                f"{global_batch_size} packs per step cannot be divided among {world_size} processes; possible: "
                f"{divisors}"
            )
        self._fingerprint, self._row_length = fingerprint(mixture, global_batch_size), mixture.row_length
        self._trims_rows, self._row_multiple = bool(mixture.samples_per_pack), row_multiple
        plan = make_sampling_plan(mixture, global_batch_size)
        self.is_infinite = any(repeats and share for repeats, share in zip(plan.repeats, plan.proportions))
        states = migrate_state(state, self._fingerprint, plan, allow_changes) if state is not None else {}
        own = range(rank, global_batch_size, world_size)
        self._source = MixtureSource(mixture, workers, num_iterators=len(own) * len(plan.names), prefetch=prefetch)
        self._streams = {s: PackStream(s, plan, self._row_length, self._source, states.get(s)) for s in own}

    def next_batch(self) -> list[Pack]:
        """This rank's packs of the next step.

        A pack without a sample means that its stream is used up; without packing, also that an epoch ends.
        """
        return [self._collate(stream.next_samples()) for stream in self._streams.values()]

    def _collate(self, samples: list[Sample]) -> Pack:
        if not self._trims_rows:
            return collate(samples, self._row_length)
        return collate(samples, trimmed_length(sum(sample.length for sample in samples), self._row_multiple))

    def state_dict(self) -> dict[str, Any]:
        """The state before the next step as JSON, with the streams of this rank; `merge_states` merges all ranks."""
        return {
            "fingerprint": self._fingerprint,
            "streams": {str(s): stream.state_dict() for s, stream in self._streams.items()},
        }

    def num_started(self) -> list[int]:
        """Records of each dataset that this rank's streams have started, over all epochs."""
        return [sum(counts) for counts in zip(*(stream.num_started() for stream in self._streams.values()))]

    def skipped(self) -> dict[str, int]:
        """Number of records that gave no sample, by reason."""
        total: dict[str, int] = {}
        for stream in self._streams.values():
            for reason, count in stream.skipped.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def close(self) -> None:
        """Ends the workers."""
        self._source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
