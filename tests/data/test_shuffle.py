"""Shuffling: pure functions of numbers."""

import numpy as np
import pytest

from fm9g.data.shuffle import Permutation, low_discrepancy, splitmix64


def test_hash_and_sequence_are_what_they_always_were() -> None:
    """Another value here would change the order of samples of every run that is resumed."""
    assert splitmix64(1, 2, 3) == 15020427595393229491
    assert low_discrepancy(5, 1, 2) == pytest.approx(0.82786920, abs=1e-8)
    assert Permutation(10, 1, 2)(np.arange(10)).tolist() == [7, 8, 5, 1, 9, 2, 4, 3, 0, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_a_permutation_hits_every_number_once(size: int) -> None:
    assert sorted(Permutation(size, 3, 1)(np.arange(size)).tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    values = Permutation(1000, 5)(np.arange(1000)).tolist()
    assert values != Permutation(1000, 6)(np.arange(1000)).tolist()
    assert abs(np.corrcoef(values, range(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.1


def test_the_sequence_spreads_better_than_chance() -> None:
    inside = sum(low_discrepancy(n, 4, 2) < 0.3 for n in range(10_000))
    assert abs(inside - 3000) < 5
