"""Which ranks the others wait for when a step hangs."""

from __future__ import annotations

from fm9g.launch.stack_dump import find_stragglers


def test_stragglers():
    assert find_stragglers([3, 2, 3], [True, False, True]) == [1]
    assert find_stragglers([3, 3, 3], [True, False, True]) == [1]
    assert find_stragglers([3, 3], [True, True]) == [0, 1]
