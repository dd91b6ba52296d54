"""Token arrays: ids, masks, weights and samples in one array."""

from __future__ import annotations

import numpy as np
import pytest

from fm9g.data.encode.token_array import (
    SEPARATOR,
    is_weighted,
    join_samples,
    loss_weights,
    make_token_array,
    split_samples,
    token_ids,
)

IDS = np.array([0, 5, 122752, 2**31 - 2, 7])


def test_ids_and_masks_are_kept() -> None:
    array = make_token_array(IDS, np.array([0, 1, 0, 1, 1]))
    assert array.dtype == np.int32
    assert array.tolist() == [~0, 5, ~122752, 2**31 - 2, 7]
    np.testing.assert_array_equal(token_ids(array), IDS)
    assert loss_weights(array).tolist() == [0, 1, 0, 1, 1]
    assert not is_weighted(array)


def test_weights_are_kept_to_the_bit() -> None:
    weights = np.array([0, 1, 0.1, 2.5, 1e-30], np.float32)
    array = make_token_array(IDS, weights)
    assert array.dtype == np.int64
    np.testing.assert_array_equal(token_ids(array), IDS)
    np.testing.assert_array_equal(loss_weights(array), weights)
    assert is_weighted(array)
    assert (array >= 0).tolist() == [False, True, True, True, True]
    # Beside records without weights, in one array.
    together = np.concatenate([make_token_array(IDS, np.array([0, 1, 0, 1, 1])), array])
    np.testing.assert_array_equal(token_ids(together), [*IDS, *IDS])
    np.testing.assert_array_equal(loss_weights(together), [0, 1, 0, 1, 1, *weights])
    assert not is_weighted(together[:5])


@pytest.mark.parametrize("weight", [1, 0.5])
def test_samples_of_a_record_are_parted_again(weight: float) -> None:
    samples = [make_token_array(IDS[:n], np.full(n, weight)) for n in (3, 1, 5)]
    for one, other in zip(split_samples(join_samples(samples)), samples, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(join_samples([])) == 0
    assert split_samples(samples[0])[0] is samples[0]
    assert SEPARATOR not in make_token_array(IDS, np.zeros(5))
