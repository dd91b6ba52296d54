"""Worker processes that encode records: a pure function from record indices to token arrays.

training process    chunk of indices  ──>  worker: read, transform, render, tokenize
                    token arrays      <──  concatenated, with their lengths
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fm9g.data.load.mixture import Mixture, MixtureSpec
from fm9g.data.workers import shared_memory_errors, start_workers, stop_workers
from fm9g.errors import UserError

MAX_CHUNK = 64  # records of a chunk, which a worker encodes at a time
_POLL_SECONDS = 5.0  # between two checks that a result can still arrive
_MAX_BYTES_AHEAD = 128 << 20  # approximate bytes of records that are encoded ahead

_worker: _Worker  # in a worker process
_exit = os._exit  # while a transform runs, os._exit is replaced by a refusal


class EncodedChunk(NamedTuple):
    """The token arrays of some records end to end, as a worker sends them.

    used_rng: whether a transform drew random numbers. issues: of these records, see Mixture.issues.
    """

    concatenated: np.ndarray
    lengths: np.ndarray
    used_rng: bool
    issues: Counter[str]

    def split(self) -> list[np.ndarray]:
        """The token array of each record."""
        return np.split(self.concatenated, np.cumsum(self.lengths)[:-1])


class EncodingPool:
    """Worker processes, each with its own mixture; without workers, this process does the same work."""

    def __init__(self, mixture: Mixture, workers: int, max_chunk: int = MAX_CHUNK) -> None:
        """max_chunk: records of a chunk, at most."""
        assert max_chunk <= MAX_CHUNK
        self.mixture, self.workers, self._max_chunk = mixture, workers, max_chunk
        self._pool = None
        if workers:
            context = multiprocessing.get_context("spawn")
            with shared_memory_errors():
                self._status = context.RawArray("q", workers * _SLOT_SIZE)
                started = context.Value("q", 0, lock=True)
            self._pool = start_workers(workers, _init_worker, mixture.spec, self._status, started)

    def tokenize(
        self,
        dataset: int,
        sample_indices: Iterator[int],
        num_iterators: int = 1,
        prefetch: int = 2,
        in_file_order: bool = False,
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Encodes the records of a dataset at these sample indices; yields chunks of indices and their token arrays.

        Args:
            num_iterators: how many such iterators run at the same time.
            prefetch: chunks that each worker is ahead, over all iterators.
            in_file_order: the indices are record indices.

        Raises UserError for a bad record and for a worker that died.
        """
        size = self._chunk_size(dataset, num_iterators)
        if self._pool is None:
            while chunk := list(islice(sample_indices, size)):
                record_indices = chunk if in_file_order else self.mixture.record_indices(dataset, chunk).tolist()
                yield chunk, self.mixture.tokenize_records(dataset, record_indices, chunk)
            return
        max_pending = max(2, math.ceil(self.workers * prefetch / num_iterators))  # one in use, one being encoded
        pending: deque[tuple[list[int], Future[EncodedChunk]]] = deque()
        try:
            while True:
                while len(pending) < max_pending and (chunk := list(islice(sample_indices, size))):
                    pending.append((chunk, self._pool.submit(_encode_in_worker, dataset, chunk, in_file_order)))
                if not pending:
                    return
                chunk, future = pending.popleft()
                encoded = self._result(future)
                self.mixture.used_rng[dataset] |= encoded.used_rng
                self.mixture.issues[dataset].update(encoded.issues)
                yield chunk, encoded.split()
        except BrokenProcessPool:  # submit raises it, too
            raise UserError(self._crash_message()) from None

    def _result(self, future: Future[EncodedChunk]) -> EncodedChunk:
        """Waits for a worker's result. Raises MemoryError if the thread that receives results could not be started."""
        assert self._pool is not None
        manager: Any = self._pool._executor_manager_thread
        while True:
            try:
                return future.result(timeout=_POLL_SECONDS)
            except TimeoutError:
                if manager is not None and not manager.is_alive():
                    raise MemoryError("the thread that waits for workers has ended") from None

    def _chunk_size(self, dataset: int, num_iterators: int) -> int:
        records = self.mixture.datasets[dataset]
        records_ahead = _MAX_BYTES_AHEAD * len(records) / max(1.0, records.used_bytes)
        return int(np.clip(records_ahead / num_iterators, 1, self._max_chunk))

    def _crash_message(self) -> str:
        """The error for a killed worker, with the records that it was encoding; others have cleared their status."""
        assert self._pool is not None
        manager: Any = self._pool._executor_manager_thread
        self._pool.shutdown(wait=False)
        if manager is not None:  # it waits for the other workers, one of which may never receive its signal to end
            manager.join(_POLL_SECONDS)
        status = []
        for slot in np.array(self._status).reshape(-1, _SLOT_SIZE):
            if slot[0]:
                config = self.mixture.configs[slot[0] - 1]
                lines = ", ".join(str(number + 1) for number in slot[2 : 2 + slot[1]])
                status.append(f"{config.task_name}, line {lines} of {config.path}")
        return (
            f"a worker that encodes records was killed while it was at {'; '.join(status) or 'its start'}. Out of "
            "memory? Use fewer dataloader_num_workers; 0 encodes in the training process"
        )

    def close(self) -> None:
        """Kills the workers, even busy ones."""
        if self._pool is not None:
            stop_workers(self._pool)

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_SLOT_SIZE = 2 + MAX_CHUNK  # integers of a worker's status: dataset + 1 or 0, count, record indices


class _Worker:
    """The state of a worker process: a mixture, and a status in shared memory that outlives it if it is killed."""

    def __init__(self, spec: MixtureSpec, status: Any, started: Any) -> None:
        self.mixture = Mixture(*spec)
        with started.get_lock():
            self._start = _SLOT_SIZE * (started.value % (len(status) // _SLOT_SIZE))
            started.value += 1
        self._status = status
        signal.signal(signal.SIGTERM, self._end)  # the pool sends it to the other workers when one is killed

    def _end(self, *_: object) -> None:
        self._status[self._start] = 0
        _exit(1)

    def encode(self, dataset: int, chunk: list[int], in_file_order: bool) -> EncodedChunk:
        mixture = self.mixture
        record_indices = chunk if in_file_order else mixture.record_indices(dataset, chunk).tolist()
        rendered = []
        for record_index, sample_index in zip(record_indices, chunk):
            self._set_status(dataset, [record_index])
            rendered.append(mixture.render(dataset, record_index, sample_index))
        self._set_status(dataset, record_indices)
        tokens = mixture.tokenize(rendered, dataset, record_indices)
        self._status[self._start] = 0
        lengths = np.array([len(record) for record in tokens], np.int64)
        issues, mixture.issues[dataset] = mixture.issues[dataset], Counter()
        return EncodedChunk(np.concatenate(tokens), lengths, mixture.used_rng[dataset], issues)

    def _set_status(self, dataset: int, record_indices: Sequence[int]) -> None:
        start = self._start
        self._status[start : start + 2 + len(record_indices)] = [dataset + 1, len(record_indices), *record_indices]


def _init_worker(*arguments: Any) -> None:
    global _worker
    _worker = _Worker(*arguments)


def _encode_in_worker(dataset: int, chunk: list[int], in_file_order: bool) -> EncodedChunk:
    return _worker.encode(dataset, chunk, in_file_order)
