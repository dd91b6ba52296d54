"""Mixtures that several tests of loading open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import make_records
from helpers.mixtures import DATASETS, open_mixture

from fm9g.data.load.mixture import Mixture


@pytest.fixture
def path(make_mixture: Callable[..., Path]) -> Path:
    """A mixture file of three datasets: a, b, c."""
    return make_mixture(DATASETS)


@pytest.fixture
def mixture(make_mixture: Callable[..., Path], tokenizer_path: Path) -> Mixture:
    """A dataset of few records that repeats, and one of many that does."""
    path = make_mixture(
        {"few": make_records(3, 1), "many": make_records(60, 2, longest=120)}, few={"allow_repeat": True}
    )
    return open_mixture(path, tokenizer_path)
