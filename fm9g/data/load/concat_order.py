"""The order of samples without packing: an epoch has each record of all datasets once, and ends with a step.

With 3 records of A, 2 of B, G = 2 streams and packs of 1 sample, an epoch has 3 steps, and the last one a free slot:

    position   0  1 | 2  3 | 4  - | 5  6 ...
    dataset    A  B | A  B | A    | A  B          spread evenly; which record it is, the order of each dataset decides
    stream     0  1   0  1   0      0  1
    step         1      2      3      4           the second epoch starts with step 4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np


class ConcatOrder:
    """The slots of every pack. A slot is the place of one record in a pack."""

    def __init__(self, sizes: Sequence[int], num_streams: int, samples_per_pack: int) -> None:
        """The order of an epoch.

        Args:
            sizes: records of each dataset.
            num_streams: G, the packs per step.
            samples_per_pack: slots of a pack.
        """
        self._sizes, self._num_streams, self._samples_per_pack = list(sizes), num_streams, samples_per_pack
        self._num_records = sum(sizes)
        self.steps_per_epoch = -(-self._num_records // (num_streams * samples_per_pack))
        self._datasets: np.ndarray | None = None  # (records,) the dataset of each position; None: there is only one
        if len(self._sizes) > 1:
            # Record j of n comes at the time (j + 1/2) / n of an epoch.
            datasets = np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)
            times = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
            self._datasets = datasets[np.lexsort((datasets, times))]

    def slots(self, stream: int, pack: int) -> list[int]:
        """The dataset of each slot of a stream's pack, in order."""
        first = (pack % self.steps_per_epoch) * self._samples_per_pack
        positions = np.arange(first, first + self._samples_per_pack) * self._num_streams + stream
        positions = positions[positions < self._num_records]
        return [0] * len(positions) if self._datasets is None else self._datasets[positions].tolist()

    def sample_indices(self, stream: int, dataset: int, num_started: int, repeats: bool) -> Iterator[int]:
        """The sample indices of a dataset that a stream reads.

        Args:
            stream: from 0 to G - 1.
            dataset: its number in `sizes`.
            num_started: samples that the stream has read before.
            repeats: continue with the next epochs; False: end with the first one.
        """
        if self._datasets is None:
            ranks = np.arange(stream, self._num_records, self._num_streams)
        else:
            mine = np.flatnonzero(self._datasets == dataset)  # rank -> position
            ranks = np.flatnonzero(mine % self._num_streams == stream)
        if not len(ranks):
            return
        for started in count(num_started):
            epoch, at = divmod(started, len(ranks))
            if epoch and not repeats:
                return
            yield epoch * self._sizes[dataset] + int(ranks[at])
