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

from fm9g.data import cache
from fm9g.data.mixture import Mixture, Recipe
from fm9g.data.tokens import is_weighted
from fm9g.data.workers import shared_memory, start_workers, stop_workers
from fm9g.errors import UserError
from fm9g.files import recover

MOST = 64  # records of a chunk, the unit of work
_PATIENCE = 5.0  # seconds after which one looks whether a result may still come
_MEMORY = 128 << 20  # bytes of records that may be encoded ahead, about

_worker: _Worker  # of a worker process
_exit = os._exit  # which is refused while a transform runs


class Tokens(NamedTuple):
    """The marked tokens of some records end to end, as they travel. drew: a transform used its random numbers.
    findings: what was found in these records, see Mixture.findings."""

    together: np.ndarray
    lengths: np.ndarray
    drew: bool
    findings: Counter[str]

    def split(self) -> list[np.ndarray]:
        return np.split(self.together, np.cumsum(self.lengths)[:-1])


class EncodingPool:
    """Worker processes with a mixture each; with none of them, the same work in this process."""

    def __init__(self, mixture: Mixture, workers: int) -> None:
        self.mixture, self.workers = mixture, workers
        self._pool = None
        if workers:
            context = multiprocessing.get_context("spawn")
            with shared_memory():
                self._doing = context.RawArray("q", workers * _SLOT)
                started = context.Value("q", 0, lock=True)
            self._pool = start_workers(workers, _prepare, mixture.recipe, self._doing, started)

    def tokens(
        self, dataset: int, places: Iterator[int], sequences: int = 1, prefetch: int = 2, in_file: bool = False
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Chunks of places of a dataset, and the marked tokens of the records there.

        in_file: places are record numbers. sequences: how many of these iterations go on at the same time; prefetch:
        chunks a worker is ahead, over all of them. Raises UserError for a bad record and for a worker that died.
        """
        size = self._chunk(dataset, sequences)
        if self._pool is None:
            while chunk := list(islice(places, size)):
                numbers = chunk if in_file else self.mixture.numbers(dataset, chunk).tolist()
                yield chunk, self.mixture.tokens(dataset, numbers, chunk)
            return
        ahead = max(2, math.ceil(self.workers * prefetch / sequences))  # one that is used, one that is made
        running: deque[tuple[list[int], Future[Tokens]]] = deque()
        try:
            while True:
                while len(running) < ahead and (chunk := list(islice(places, size))):
                    running.append((chunk, self._pool.submit(_encode, dataset, chunk, in_file)))
                if not running:
                    return
                chunk, future = running.popleft()
                found = self._result(future)
                self.mixture.drew[dataset] |= found.drew
                self.mixture.findings[dataset].update(found.findings)
                yield chunk, found.split()
        except BrokenProcessPool:  # submit raises it, too
            raise UserError(self._crash()) from None

    def _result(self, future: Future[Tokens]) -> Tokens:
        """What a worker made. Raises MemoryError where nothing will come: no thread could be started to bring it."""
        assert self._pool is not None
        manager: Any = self._pool._executor_manager_thread
        while True:
            try:
                return future.result(timeout=_PATIENCE)
            except TimeoutError:
                if manager is not None and not manager.is_alive():
                    raise MemoryError("the thread that waits for workers has ended") from None

    def _chunk(self, dataset: int, sequences: int) -> int:
        records = self.mixture.datasets[dataset]
        return int(np.clip(_MEMORY * len(records) / max(1, records.nbytes) / sequences, 1, MOST))

    def _crash(self) -> str:
        """What the workers that did not end by themselves were doing."""
        assert self._pool is not None
        manager: Any = self._pool._executor_manager_thread
        self._pool.shutdown(wait=False)
        if manager is not None:  # it waits for the others, one of which may never hear that it is to end
            manager.join(_PATIENCE)
        doing = []
        for slot in np.array(self._doing).reshape(-1, _SLOT):
            if slot[0]:
                config = self.mixture.configs[slot[0] - 1]
                lines = ", ".join(str(number + 1) for number in slot[2 : 2 + slot[1]])
                doing.append(f"{config.task_name}, line {lines} of {config.path}")
        return (
            f"a worker that encodes records was killed while it was at {'; '.join(doing) or 'its start'}. Out of "
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


_SLOT = 2 + MOST  # numbers in which a worker says what it does: dataset + 1 or 0, count, record numbers


class _Worker:
    """What a worker process has: a mixture, and a place to say what it is doing, for the case that it is killed."""

    def __init__(self, recipe: Recipe, doing: Any, started: Any) -> None:
        self.mixture = Mixture(*recipe)
        with started.get_lock():
            self._start = _SLOT * (started.value % (len(doing) // _SLOT))
            started.value += 1
        self._doing = doing
        signal.signal(signal.SIGTERM, self._end)  # sent to the others when one is killed

    def _end(self, *_: object) -> None:
        self._doing[self._start] = 0
        _exit(1)

    def encode(self, dataset: int, chunk: list[int], in_file: bool) -> Tokens:
        mixture = self.mixture
        numbers = chunk if in_file else mixture.numbers(dataset, chunk).tolist()
        texts = []
        for number, place in zip(numbers, chunk):
            self._say(dataset, [number])
            texts.append(mixture.texts(dataset, number, place))
        self._say(dataset, numbers)
        tokens = mixture.tokens_of(texts, dataset, numbers)
        self._doing[self._start] = 0
        lengths = np.array([len(record) for record in tokens], np.int64)
        findings, mixture.findings[dataset] = mixture.findings[dataset], Counter()
        return Tokens(np.concatenate(tokens), lengths, mixture.drew[dataset], findings)

    def _say(self, dataset: int, numbers: Sequence[int]) -> None:
        start = self._start
        self._doing[start : start + 2 + len(numbers)] = [dataset + 1, len(numbers), *numbers]


def _prepare(*arguments: Any) -> None:
    global _worker
    _worker = _Worker(*arguments)


def _encode(dataset: int, chunk: list[int], in_file: bool) -> Tokens:
    return _worker.encode(dataset, chunk, in_file)


def fill_cache(mixture: Mixture, workers: int) -> tuple[Mixture, list[str]]:
    """Makes the token caches that the mixture's recipe asks for and that are not there, or stale.

    Returns the mixture with its caches opened, and what was done or why not, a line each.
    """
    notes = []
    with EncodingPool(mixture, workers) as pool:
        for number, config in enumerate(mixture.configs):
            folder, key = mixture.cache_folder(number), mixture.cache_key(number)
            recover(folder)  # also beside a cache that is whole: one killed a moment too late leaves the old one there
            if mixture.caches[number]:
                continue
            if changed := cache.stale(folder, key):
                notes.append(f"token cache {folder} is stale and made anew: {'; '.join(changed)}")
            size = len(mixture.datasets[number])
            records = (tokens for _, tokens in pool.tokens(number, iter(range(size)), in_file=True))
            try:
                cache.build(folder, key, _cacheable(mixture, number, records), size)
            except _NotCacheableError as reason:
                notes.append(f"{config.task_name}: no token cache: {reason}")
    return Mixture(*mixture.recipe), notes


class _NotCacheableError(Exception):
    """Why the tokens of a dataset cannot be kept."""


def _cacheable(mixture: Mixture, dataset: int, records: Iterator[Any]) -> Iterator[Any]:
    for chunk in records:
        if mixture.drew[dataset]:
            script = mixture.configs[dataset].transforms
            raise _NotCacheableError(f"{script} draws random numbers, epochs differ")
        if any(map(is_weighted, chunk)):
            raise _NotCacheableError("its tokens have weights, for which a cache has no place")
        yield [record.astype(np.int32, copy=False) for record in chunk]
