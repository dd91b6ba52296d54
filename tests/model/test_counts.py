"""Counts of weights and FLOPs, beside the model itself and a mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.engine_harness import documents
from helpers.plan_models import SMALL, shipped

from fm9g.data.load.packing import collate
from fm9g.model.counts import count_weights, flops_per_token, sum_sq_seqlens, trained_layers
from fm9g.model.transformer import weight_shapes
from fm9g.train.timer import StepTimer


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("2b", 2_724_880_896),
        ("4b", 4_129_681_920),
        ("7b", 7_668_831_744),
        ("8b", 8_765_444_096),
        ("70b", 80_814_546_944),
    ],
)
def test_parameters_are_those_of_the_model(name: str, count: int) -> None:
    model = shipped(name)
    assert count_weights(model) == count == sum(shape.numel() for shape in weight_shapes(model).values())


def test_flops_are_those_of_the_matrices_and_of_causal_attention() -> None:
    without = flops_per_token(SMALL, max_length=0)
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 512 * 128
    assert without == 6 * matrices
    # Scores and mixing: 2 products of 2 x 128 FLOPs for each of 300 tokens and layer, half masked, 3 passes.
    assert flops_per_token(SMALL, 300) - without == 3 * 4 * 2 * 2 * 128 * 300 / 2
    tied = replace(SMALL, tie_word_embeddings=True)
    assert flops_per_token(tied, 0) == without


def test_work_is_counted_within_windows() -> None:
    """Against the pairs of a mask: a square counts every pair of a full layer twice, but for the diagonal."""
    for length, window in ((5, 8), (8, 8), (20, 8), (20, 1), (20, 0)):
        ages = torch.arange(length)[:, None] - torch.arange(length)
        pairs = int(((ages >= 0) & (ages < (window or length))).sum())
        assert sum_sq_seqlens([window], [length]) == pytest.approx(2 * pairs - min(length, window or length))
    assert sum_sq_seqlens((0, 8), [20]) == (20 * 20 + sum_sq_seqlens([8], [20])) / 2
    packs = [collate(group, 32) for group in documents(1)]
    lengths = np.concatenate([np.diff(pack.cu_seqlens[pack.cu_seqlens <= pack.tokens]) for pack in packs])
    for windows in ((0, 0), (0, 6), (6, 6)):
        timer = StepTimer(windows)
        timer.count(packs)
        assert timer.collect_and_reset().sum_sq_seqlens == sum_sq_seqlens(windows, lengths.tolist())


def test_the_trained_layers_are_the_last_or_the_first_ones() -> None:
    assert [*trained_layers(5, 2)] == [3, 4]
    assert [*trained_layers(5, -2)] == [0, 1]
    assert [*trained_layers(5, 0)] == [*trained_layers(5, 9)] == [*trained_layers(5, -9)] == [0, 1, 2, 3, 4]
