"""Statistics and differences of tensors equal those of numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checkpoints import (
    no_progress,
)

from fm9g.checkpoint.tensor_diff import compare_tensors, weight_stats


def test_statistics_are_those_of_numpy_over_pieces() -> None:
    values = 100 + torch.randn(10, 9, generator=torch.Generator().manual_seed(1))
    values[3, 3], values[4, 4] = math.nan, math.inf
    kinds = {"a": values, "turned": values.T, "half": values.half(), "none": torch.full((3,), math.nan)}
    torch.save({**kinds, "empty": torch.ones(0), "number": torch.tensor(3)}, "file.pt")
    found = {row.name: row for row in weight_stats(Path("file.pt"), no_progress, chunk_elements=7)}
    for name in ("a", "turned", "half"):
        finite = kinds[name].double().numpy()
        finite = finite[np.isfinite(finite)]
        expected = (finite.mean(), finite.std(), finite.min(), finite.max())
        row = found[name]
        assert (row.mean, row.std, row.min, row.max) == pytest.approx(expected, rel=1e-12)
        assert (row.not_finite, row.shape) == (2, list(kinds[name].shape))
    assert (found["none"].not_finite, found["none"].mean) == (3, None)
    assert (found["empty"].not_finite, found["empty"].min) == (0, None)
    assert (found["number"].mean, found["number"].std, found["number"].dtype) == (3, 0, "int64")


def test_distances_are_those_of_numpy_over_pieces() -> None:
    one = torch.randn(10, 9, generator=torch.Generator().manual_seed(1))
    two = one + 0.1 * torch.randn(10, 9, generator=torch.Generator().manual_seed(2))
    torch.save({"w": one}, "a.pt")
    torch.save({"w": two}, "b.pt")
    [found] = compare_tensors(Path("a.pt"), Path("b.pt"), no_progress, chunk_elements=7).deltas
    x, y = one.double().numpy().ravel(), two.double().numpy().ravel()
    assert found.max_abs == pytest.approx(abs(x - y).max(), rel=1e-12)
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
