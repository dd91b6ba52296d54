"""The loader: the packs of every step, encoded ahead by worker processes, and the position to resume from.

Workers only turn (dataset, place) into samples, a pure function; draws and packing stay in the training process. So
any number of workers gives the same packs, and nothing has to be asked of them to know the position.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from fm9g.data.encode import Encoded
from fm9g.data.mixture import Mixture
from fm9g.data.pack import Pack
from fm9g.data.stream import Odds, Stream
from fm9g.errors import UserError

CHUNK = 16  # records a worker encodes at a time

_worker_mixture: Mixture  # of a worker process


class Loader:
    """Gives each rank its packs of a step, in the order of the streams."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        capacity: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        position: dict[str, Any] | None = None,
    ) -> None:
        """capacity: tokens of a pack. global_batch: packs a step, over all ranks. prefetch: chunks a worker is ahead.
        position: as `position()` gave it.

        Raises UserError where the ranks do not divide global_batch, or the position belongs to other data.
        """
        assert capacity >= mixture.max_length  # else a sample might fit into no pack
        if global_batch % world_size:
            fits = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            raise UserError(f"{global_batch} packs a step cannot be dealt to {world_size} processes; possible: {fits}")
        self._fingerprint = {**mixture.fingerprint(), "capacity": capacity, "global_batch": global_batch}
        self._fingerprint["shares"] = mixture.shares()
        states: dict[str, Any] = {}
        if position is not None:
            states, saved = position.get("streams", {}), position.get("fingerprint", {})
            if "mean_tokens" not in position or len(states) != saved.get("global_batch"):
                raise UserError("the data position of the checkpoint is not whole; take another one")
            _check_same(saved, self._fingerprint)
            self._mean_tokens = position["mean_tokens"]
        else:
            self._mean_tokens = mixture.mean_tokens()
        odds = Odds(
            names=[config.task_name for config in mixture.configs],
            sizes=mixture.sizes,
            repeats=[config.allow_repeat for config in mixture.configs],
            chances=[share / tokens for share, tokens in zip(mixture.shares(), self._mean_tokens)],
            streams=global_batch,
            seed=mixture.seed,
        )
        self.endless = any(repeats and chance for repeats, chance in zip(odds.repeats, odds.chances))
        own = range(rank, global_batch, world_size)
        self._pool = _start_workers(mixture, workers) if workers else None
        self._mixture = mixture
        # Chunks in flight, for each dataset of each stream.
        self._ahead = max(1, math.ceil(workers * prefetch / (len(own) * len(mixture.configs))))
        self._streams = {
            s: Stream(s, odds, capacity, mixture.encode, self._read_ahead, states.get(str(s))) for s in own
        }

    def next_step(self) -> list[Pack]:
        """This rank's packs of the next step. A pack without a sample: its stream is used up."""
        return [stream.next_pack() for stream in self._streams.values()]

    def position(self) -> dict[str, Any]:
        """Where the next step starts, as JSON, with the streams of this rank (merge_positions puts ranks together)."""
        return {
            "fingerprint": self._fingerprint,
            "mean_tokens": self._mean_tokens,
            "streams": {str(s): stream.state() for s, stream in self._streams.items()},
        }

    def skipped(self) -> dict[str, int]:
        """How many records gave no sample, by reason."""
        total: dict[str, int] = {}
        for stream in self._streams.values():
            for reason, count in stream.skipped.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self, dataset: int, places: Iterator[int]) -> Iterator[tuple[int, Encoded]]:
        if self._pool is None:
            for place in places:
                yield place, self._mixture.encode(dataset, place)
            return
        running: deque[tuple[list[int], Future[list[Encoded]]]] = deque()
        while True:
            while len(running) < self._ahead and (chunk := list(islice(places, CHUNK))):
                running.append((chunk, self._pool.submit(_encode_chunk, dataset, chunk)))
            if not running:
                return
            chunk, future = running.popleft()
            try:
                encoded = future.result()
            except BrokenProcessPool:
                raise UserError(
                    "a worker that encodes records was killed (out of memory?); "
                    "fewer dataloader_num_workers need less, 0 encodes in the training process"
                ) from None
            yield from zip(chunk, encoded)


def merge_positions(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """One position from those of all ranks."""
    merged = dict(positions[0])
    merged["streams"] = {s: state for position in positions for s, state in position["streams"].items()}
    return merged


def _start_workers(mixture: Mixture, workers: int) -> ProcessPoolExecutor:
    # spawn: a forked child of a process with torch threads or a CUDA context can hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=mixture.recipe)


def _start_worker(*recipe: Any) -> None:
    global _worker_mixture
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends its workers
    _worker_mixture = Mixture(*recipe)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the training process was killed and could not end its workers


def _encode_chunk(dataset: int, places: list[int]) -> list[Encoded]:
    return [_worker_mixture.encode(dataset, place) for place in places]


def _check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError that names what the order of samples depends on and that has changed."""
    changed = [f"{key}: was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
    if changed:
        raise UserError(
            "the checkpoint was made from other data; its position means nothing here:\n" + "\n".join(changed)
        )
