"""Encoding records elsewhere: worker processes that turn record numbers into tokens, a pure function."""

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

from fm9g.data.encode.token_array import is_weighted
from fm9g.data.load.mixture import Mixture, MixtureSpec
from fm9g.data.load.token_cache import cache_mismatches, write_cache
from fm9g.data.workers import shared_memory_errors, start_workers, stop_workers
from fm9g.errors import UserError
from fm9g.io.atomic import recover_interrupted

MAX_CHUNK = 64  # records of a chunk, the unit of work
_POLL_SECONDS = 5.0  # seconds after which one looks whether a result may still come
_MAX_BYTES_AHEAD = 128 << 20  # bytes of records that may be encoded ahead, about

_worker: _Worker  # of a worker process
_exit = os._exit  # which is refused while a transform runs


class EncodedChunk(NamedTuple):
    """The marked tokens of some records end to end, as they travel. used_rng: a transform used its random numbers.
    issues: what was found in these records, see Mixture.issues."""

    concatenated: np.ndarray
    lengths: np.ndarray
    used_rng: bool
    issues: Counter[str]

    def split(self) -> list[np.ndarray]:
        return np.split(self.concatenated, np.cumsum(self.lengths)[:-1])


class EncodingPool:
    """Worker processes with a mixture each; with none of them, the same work in this process."""

    def __init__(self, mixture: Mixture, workers: int) -> None:
        self.mixture, self.workers = mixture, workers
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
        """Chunks of places of a dataset, and the marked tokens of the records there.

        in_file_order: places are record numbers. num_iterators: how many of these iterations go on at the same time;
        prefetch: chunks a worker is ahead, over all of them. Raises UserError for a bad record and for a worker that
        died.
        """
        size = self._chunk_size(dataset, num_iterators)
        if self._pool is None:
            while chunk := list(islice(sample_indices, size)):
                record_indices = chunk if in_file_order else self.mixture.record_indices(dataset, chunk).tolist()
                yield chunk, self.mixture.tokenize_records(dataset, record_indices, chunk)
            return
        max_pending = max(2, math.ceil(self.workers * prefetch / num_iterators))  # one that is used, one that is made
        pending: deque[tuple[list[int], Future[EncodedChunk]]] = deque()
        try:
            while True:
                while len(pending) < max_pending and (chunk := list(islice(sample_indices, size))):
                    pending.append((chunk, self._pool.submit(_encode_in_worker, dataset, chunk, in_file_order)))
                if not pending:
                    return
                chunk, future = pending.popleft()
                found = self._result(future)
                self.mixture.used_rng[dataset] |= found.used_rng
                self.mixture.issues[dataset].update(found.issues)
                yield chunk, found.split()
        except BrokenProcessPool:  # submit raises it, too
            raise UserError(self._crash_message()) from None

    def _result(self, future: Future[EncodedChunk]) -> EncodedChunk:
        """What a worker made. Raises MemoryError where nothing will come: no thread could be started to bring it."""
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
        return int(np.clip(_MAX_BYTES_AHEAD * len(records) / max(1, records.nbytes) / num_iterators, 1, MAX_CHUNK))

    def _crash_message(self) -> str:
        """What the workers that did not end by themselves were doing."""
        assert self._pool is not None
        manager: Any = self._pool._executor_manager_thread
        self._pool.shutdown(wait=False)
        if manager is not None:  # it waits for the others, one of which may never hear that it is to end
            manager.join(_POLL_SECONDS)
        status = []
        for slot in np.array(self._status).reshape(-1, _SLOT_SIZE):
            if slot[0]:
                config = self.mixture.configs[slot[0] - 1]
                lines = ", ".join(str(number + 1) for number in slot[2 : 2 + slot[1]])
                status.append(f"{config.task_name}, line {lines} of {config.path}")
        return (
            f"a worker that encodes records was killed while it was at {'; '.join(status) or 'its start'}. Out of "
            "memory? Fewer dataloader_num_workers need less, 0 encodes in the training process"
        )

    def close(self) -> None:
        """Ends the workers, whatever they are at."""
        if self._pool is not None:
            stop_workers(self._pool)

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_SLOT_SIZE = 2 + MAX_CHUNK  # numbers in which a worker says what it does: dataset + 1 or 0, count, record numbers


class _Worker:
    """What a worker process has: a mixture, and a place to say what it is doing, for the case that it is killed."""

    def __init__(self, spec: MixtureSpec, status: Any, started: Any) -> None:
        self.mixture = Mixture(*spec)
        with started.get_lock():
            self._start = _SLOT_SIZE * (started.value % (len(status) // _SLOT_SIZE))
            started.value += 1
        self._status = status
        signal.signal(signal.SIGTERM, self._end)  # sent to the others when one is killed

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


def build_token_cache(mixture: Mixture, workers: int) -> tuple[Mixture, list[str]]:
    """Makes the token caches that the mixture's spec asks for and that are not there, or stale.

    Returns the mixture with its caches opened, and what was done or why not, a line each.
    """
    notes = []
    with EncodingPool(mixture, workers) as pool:
        for number, config in enumerate(mixture.configs):
            folder, key = mixture.cache_folder(number), mixture.cache_key(number)
            recover_interrupted(
                folder
            )  # also beside a cache that is whole: one killed a moment too late leaves the old one there
            if mixture.caches[number]:
                continue
            if changed := cache_mismatches(folder, key):
                notes.append(f"token cache {folder} is stale and made anew: {'; '.join(changed)}")
            size = len(mixture.datasets[number])
            records = (tokens for _, tokens in pool.tokenize(number, iter(range(size)), in_file_order=True))
            try:
                write_cache(folder, key, _check_cacheable(mixture, number, records), size)
            except _NotCacheableError as reason:
                notes.append(f"{config.task_name}: no token cache: {reason}")
    return Mixture(*mixture.spec), notes


class _NotCacheableError(Exception):
    """Why the tokens of a dataset cannot be kept."""


def _check_cacheable(mixture: Mixture, dataset: int, records: Iterator[Any]) -> Iterator[Any]:
    for chunk in records:
        if mixture.used_rng[dataset]:
            script = mixture.configs[dataset].transforms
            raise _NotCacheableError(f"{script} draws random numbers, epochs differ")
        if any(map(is_weighted, chunk)):
            raise _NotCacheableError("its tokens have weights, for which a cache has no place")
        yield [record.astype(np.int32, copy=False) for record in chunk]
