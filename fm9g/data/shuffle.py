"""The order of samples, as pure functions of numbers: any element is computed without the ones before it.

Nothing here holds state, so the order cannot depend on ranks, workers or restarts.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's increment, and the step of the Weyl sequence below
_ROUNDS = 4


def splitmix64(*keys: int) -> int:
    """A 64-bit hash of whole numbers >= 0: SplitMix64 (Steele, Lea, Flood 2014) with a key folded in each round."""
    state = 0
    for key in keys:
        state = (state ^ (key & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def low_discrepancy(number: int, *keys: int) -> float:
    """Element `number` of a low-discrepancy sequence in [0, 1): a Weyl sequence that starts where the keys say.

    Among the first n elements, the share that falls into an interval differs from its length by O(log(n)/n), where
    independent draws would differ by O(1/sqrt(n)).
    """
    return ((splitmix64(*keys) + number * _GOLDEN & _MASK) >> 11) * 2.0**-53


class Permutation:
    """A keyed permutation of range(size), computed per index: a Feistel network with cycle walking."""

    def __init__(self, size: int, *keys: int) -> None:
        self.size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits in each half; the domain is at most 4 * size
        self._half, self._low = np.uint64(half), np.uint64((1 << half) - 1)
        # The first round of splitmix64(key, value) is the same for every value.
        self._keys = [np.uint64(splitmix64(splitmix64(*keys, round_number))) for round_number in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """(n,) int64: where these elements of range(size) go."""
        found = self._permute(indices.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.size)).size:  # walk on: the network permutes a power of four
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low
        for state in self._keys:
            left, right = right, left ^ (_splitmix64_array(state, right) & self._low)
        return left << self._half | right


def _splitmix64_array(state: np.uint64, values: np.ndarray) -> np.ndarray:
    """The last round of `splitmix64` for many values; unsigned arrays wrap as the mask there does."""
    found = (state ^ values) + np.uint64(_GOLDEN)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))
