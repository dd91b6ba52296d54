"""The order of a dataset's records: an endless sequence of epochs, each a new permutation of all records."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fm9g.data.shuffle import Permutation

_SHUFFLE_SALT = 1  # keeps these random numbers apart from those of other purposes
_SMALL_DATASET = 4096  # records; the permutations of a small dataset are computed as arrays
_MAX_CACHED_EPOCHS, _MAX_CACHED_RECORDS = 1024, 1 << 19  # per dataset


class EpochOrder:
    """The order of one dataset.

    With 3 records and G = 2 streams:

        sample index   0  1  2 | 3  4  5 | 6  7  8 ...
        epoch          0  0  0 | 1  1  1 | 2  2  2
        record         2  0  1 | 0  1  2 | 1  2  0
        stream         0  1  0 | 1  0  1 | 0  1  0
    """

    def __init__(self, size: int, seed: int, key: int) -> None:
        """size: records. key: a hash of the dataset's name."""
        self._size, self._seed, self._key = size, seed, key
        self._is_small = size <= _SMALL_DATASET
        self._max_cached = _MAX_CACHED_EPOCHS
        if self._is_small:
            self._max_cached = min(_MAX_CACHED_EPOCHS, _MAX_CACHED_RECORDS // size)
        self._epochs: dict[int, Callable[[np.ndarray], np.ndarray]] = {}

    def record_indices(self, sample_indices: Sequence[int]) -> np.ndarray:
        """(n,) the records at these sample indices."""
        epochs, offsets = np.divmod(np.array(sample_indices, np.int64), self._size)
        record_indices = np.empty_like(offsets)
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            record_indices[here] = self._permutation(epoch)(offsets[here])
        return record_indices

    def _permutation(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        if epoch not in self._epochs:
            if len(self._epochs) >= self._max_cached:
                self._epochs.clear()
            permutation = Permutation(self._size, self._seed, _SHUFFLE_SALT, self._key, epoch)
            # A stream meets few records of each epoch of a small dataset: an array is looked up fastest.
            self._epochs[epoch] = permutation(np.arange(self._size)).__getitem__ if self._is_small else permutation
        return self._epochs[epoch]
