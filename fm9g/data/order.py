"""The order of samples, as pure functions of numbers: any element is computed without the ones before it.

Nothing here holds state, so the order cannot depend on ranks, workers or restarts.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's increment, and the step of the Weyl sequence below
_ROUNDS = 4


def mix(*keys: int) -> int:
    """A 64-bit hash of whole numbers >= 0: SplitMix64 (Steele, Lea, Flood 2014) with a key folded in each round."""
    state = 0
    for key in keys:
        state = (state ^ (key & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def spread(number: int, *keys: int) -> float:
    """Element `number` of a low-discrepancy sequence in [0, 1): a Weyl sequence that starts where the keys say.

    Among the first n elements, the share that falls into an interval differs from its length by O(log(n)/n), where
    independent draws would differ by O(1/sqrt(n)).
    """
    return ((mix(*keys) + number * _GOLDEN & _MASK) >> 11) * 2.0**-53


class Permutation:
    """A keyed permutation of range(size), computed per index: a Feistel network with cycle walking.

    Each call costs a few microseconds whatever the size.
    """

    def __init__(self, size: int, *keys: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits in each half; the domain is at most 4 * size
        self._keys = [mix(*keys, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where range(size)'s element `index` goes."""
        half, low = self._half, (1 << self._half) - 1
        while True:
            left, right = index >> half, index & low
            for key in self._keys:
                left, right = right, left ^ (mix(key, right) & low)
            index = left << half | right
            if index < self.size:  # else walk on: the network permutes a power of four
                return index
