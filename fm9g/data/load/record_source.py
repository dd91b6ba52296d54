"""Record sources: encoded records by dataset and sample index, which is all that a pack stream reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice

from fm9g.data.encode.oversize import EncodedRecord
from fm9g.data.load.encoding_pool import MAX_CHUNK, EncodingPool
from fm9g.data.load.mixture import Mixture

_CACHED_CHUNK = 256  # records read from a token cache at a time


class RecordSource(ABC):
    """A pure function from (dataset, sample index) to an encoded record.

    A sample index is a position in a dataset's endless sequence of epochs.
    """

    chunk_size = MAX_CHUNK  # records that read_ahead encodes at a time

    @abstractmethod
    def encode(self, dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        """Encodes the records at these sample indices."""

    def read_ahead(self, dataset: int, sample_indices: Iterator[int]) -> Iterator[tuple[int, EncodedRecord]]:
        """Yields (sample index, encoded record) in order; it may encode later ones before they are asked for."""
        while chunk := list(islice(sample_indices, self.chunk_size)):
            yield from zip(chunk, self.encode(dataset, chunk))


class MixtureSource(RecordSource):
    """The records of a mixture, from its token caches where there are any, else encoded by worker processes."""

    chunk_size = _CACHED_CHUNK

    def __init__(
        self, mixture: Mixture, workers: int = 0, num_iterators: int = 1, prefetch: int = 2, max_chunk: int = MAX_CHUNK
    ) -> None:
        """Starts the workers.

        Args:
            workers: processes that encode; with 0, records are encoded in this process as they are asked for.
            num_iterators: how many `read_ahead` iterators run at the same time.
            prefetch: chunks that each worker is ahead, over all iterators.
            max_chunk: records encoded at a time, at most.
        """
        self._mixture, self._num_iterators, self._prefetch = mixture, num_iterators, prefetch
        self._pool = EncodingPool(mixture, 0 if all(mixture.caches) else workers, max_chunk)

    def encode(self, dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        return self._mixture.encode(dataset, sample_indices)

    def read_ahead(self, dataset: int, sample_indices: Iterator[int]) -> Iterator[tuple[int, EncodedRecord]]:
        if self._mixture.caches[dataset]:
            yield from super().read_ahead(dataset, sample_indices)
            return
        for chunk, records in self._pool.tokenize(dataset, sample_indices, self._num_iterators, self._prefetch):
            for sample_index, tokens in zip(chunk, records):
                yield sample_index, self._mixture.split_or_truncate(dataset, tokens)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    def __enter__(self) -> MixtureSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
