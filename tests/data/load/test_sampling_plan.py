"""Which records a stream reads."""

from itertools import islice

import pytest
from helpers.sampling import make_plan


@pytest.mark.parametrize("streams", [1, 4, 7])
@pytest.mark.parametrize("size", [5, 30])
def test_every_epoch_uses_every_record_once(streams: int, size: int) -> None:
    of = make_plan([size], streams)  # a dataset smaller than the number of streams, too
    taken = sorted(
        sample_index for s in range(streams) for sample_index in islice(of.sample_indices(s, 0, 0), 3 * size)
    )
    assert taken == list(range(3 * size * streams))
    assert list(islice(of.sample_indices(2, 0, 5), 2)) == [5 * streams + 2, 6 * streams + 2]


def test_a_dataset_without_repeat_ends_after_its_records() -> None:
    of = make_plan([10, 40], 3, repeats=[False, False])
    assert sorted(sample_index for s in range(3) for sample_index in of.sample_indices(s, 0, 0)) == list(range(10))
