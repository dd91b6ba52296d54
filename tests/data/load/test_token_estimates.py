"""Token counts that are measured on a few records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import make_records
from helpers.mixtures import open_mixture

from fm9g.data.load.token_estimates import estimate_mean_tokens

Make = Callable[..., Path]


def test_average_tokens_are_configured_or_measured(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({name: make_records(40) for name in "abc"}, a={"ave_tokens_per_line": 9}, b={"avg_tokens": 9e9})
    mixture = open_mixture(path, tokenizer_path)
    measured = np.mean([len(piece) - 1 for encoded in mixture.encode(2, range(40)) for piece in encoded.segments])
    assert estimate_mean_tokens(mixture) == [9, 64, pytest.approx(measured)]
