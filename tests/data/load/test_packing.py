"""The layout of a pack."""

from __future__ import annotations

import numpy as np

from fm9g.data.encode.token_array import (
    make_token_array,
)
from fm9g.data.load.packing import IGNORE_INDEX, Sample, collate

IDS = np.array([0, 5, 122752, 2**31 - 2, 7])


def test_a_pack_has_weights_where_a_sample_has() -> None:
    plain, weighted = make_token_array(IDS[:3], np.array([0, 0, 1])), make_token_array(IDS[:3], np.array([0, 0.5, 2]))
    pack = collate([Sample(plain, 0, 0, 0), Sample(plain, 0, 1, 0)], 6)
    assert pack.target_weights is None
    assert pack.total_weight == pack.target_tokens == 2
    pack = collate([Sample(plain, 0, 0, 0), Sample(weighted, 1, 0, 0)], 6)
    assert pack.input_ids.tolist() == [0, 5, 0, 5, 0, 0]
    assert pack.targets.tolist() == [IGNORE_INDEX, 122752, 5, 122752, IGNORE_INDEX, IGNORE_INDEX]
    assert pack.target_weights is not None
    assert pack.target_weights.tolist() == [0, 1, 0.5, 2, 0, 0]
    assert (pack.total_weight, pack.target_tokens) == (3.5, 3)


def sample(ids: list[int], dataset: int) -> Sample:
    return Sample(np.array([*ids, ids[-1] + 1], np.int32), dataset, 0, 0)


def test_a_pack_is_laid_out_as_the_format_says() -> None:
    pack = collate([sample([5, 6, 7], 0), sample([8, 9], 1)], 8)
    assert pack.input_ids.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert pack.targets.tolist() == [6, 7, 8, 9, 10, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert pack.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert pack.task_ids.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert (pack.tokens, pack.target_tokens) == (5, 5)


def test_a_full_and_an_empty_pack() -> None:
    assert collate([sample([5, 6], 0)], 2).cu_seqlens.tolist() == [0, 2]
    assert collate([], 2).cu_seqlens.tolist() == [0, 2]
    assert collate([], 2).target_tokens == 0
