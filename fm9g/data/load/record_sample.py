"""A random sample of a dataset's records: a part of one permutation, so that nothing is copied.

records in the order of the permutation   | 4  0  7 | 2  6  1  5  3 |
skip 3, count 0                                       2  6  1  5  3      the rest
skip 0, count 3                             4  0  7                      what the rest leaves out
skip 3, count 7                                       2  6  1  5  3  2  6
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fm9g.data.shuffle import Permutation

_SAMPLE_SALT = 5  # keeps these random numbers apart from those of other purposes
_SMALL_DATASET = 1 << 16  # records; the permutation of a small dataset is computed as an array


@dataclass(frozen=True)
class RecordSample:
    """The records of a sample.

    Args:
        count: number of records; more than there are repeat them; 0: all that are not skipped.
        skip: number of records of the permutation that are left out at its beginning.
        seed: of the permutation. Samples with one seed are disjoint if their parts are.
    """

    count: int = 0
    skip: int = 0
    seed: int = 0

    def __bool__(self) -> bool:
        """Whether it differs from the dataset."""
        return bool(self.count or self.skip)

    def size(self, num_records: int) -> int:
        """Number of records of the sample of a dataset; 0 if `skip` leaves none."""
        rest = max(0, num_records - self.skip)
        return (self.count or rest) if rest else 0

    def order(self, num_records: int) -> Callable[[int], int]:
        """The function from a position of the sample to the record of the dataset. `size` must not be 0."""
        permutation = Permutation(num_records, self.seed, _SAMPLE_SALT)
        images = permutation(np.arange(num_records)) if num_records <= _SMALL_DATASET else None
        rest = num_records - self.skip

        def record(position: int) -> int:
            index = self.skip + position % rest
            return int(permutation(np.array([index]))[0] if images is None else images[index])

        return record


ALL_RECORDS = RecordSample()
