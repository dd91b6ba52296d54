"""The order of samples, as pure functions of integers: any element is computed without its predecessors.

Nothing here has state, so the order cannot depend on ranks, workers or restarts.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's increment, and that of the Weyl sequence
_ROUNDS = 4


def splitmix64(*keys: int) -> int:
    """A 64-bit hash of integers >= 0: SplitMix64 (Steele, Lea, Flood 2014), one round per key."""
    state = 0
    for key in keys:
        state = (state ^ (key & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def low_discrepancy(number: int, *keys: int) -> float:
    """Element `number` of a low-discrepancy sequence in [0, 1): a Weyl sequence whose start depends on the keys.

    Of the first n elements, the share in any interval differs from the interval's length by O(log(n)/n); with
    independent draws the difference would be O(1/sqrt(n)).
    """
    return ((splitmix64(*keys) + number * _GOLDEN & _MASK) >> 11) * 2.0**-53


class Permutation:
    """A keyed permutation of range(size), computed per index: a Feistel network with cycle walking."""

    def __init__(self, size: int, *keys: int) -> None:
        self.size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits per half; the network's domain is at most 4 * size
        self._half, self._low = np.uint64(half), np.uint64((1 << half) - 1)
        # The first round of splitmix64(key, value) is the same for every value.
        self._keys = [np.uint64(splitmix64(splitmix64(*keys, round_number))) for round_number in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """(n,) int64, the images of these elements of range(size)."""
        images = self._permute(indices.astype(np.uint64))
        # Cycle walking: the network permutes a power of four, so images outside range(size) are permuted again.
        while (outside := np.flatnonzero(images >= self.size)).size:
            images[outside] = self._permute(images[outside])
        return images.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low
        for state in self._keys:
            left, right = right, left ^ (_splitmix64_array(state, right) & self._low)
        return left << self._half | right


def _splitmix64_array(state: np.uint64, values: np.ndarray) -> np.ndarray:
    """The last round of `splitmix64` for many values; unsigned arrays overflow as the mask there does."""
    mixed = (state ^ values) + np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
