"""Token caches: what they hold, and when they are stale or damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.mixtures import open_mixture

from fm9g.data.load.token_cache_builder import build_token_cache
from fm9g.errors import UserError

Make = Callable[..., Path]


def test_a_cache_and_a_dataset_that_change_meanwhile_are_noticed(
    path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    mixture = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache")), 0)
    for file in ("tokens", "bounds"):
        os.truncate(mixture.cache_folder(0) / file, 4)
        with pytest.raises(UserError, match="cache was changed while it was read"):
            mixture.encode(0, range(4))
    shutil.rmtree(mixture.cache_folder(1))
    with pytest.raises(UserError, match="No such file or directory; the run was reading it"):
        mixture.encode(1, range(4))
    data = mixture.datasets[2].folder / "data.jsonl"
    mixture.datasets[2].line(0)
    data.write_bytes(data.read_bytes()[::-1])  # of the same length
    with pytest.raises(UserError, match=r"data.jsonl: was changed or replaced while it was read"):
        mixture.datasets[2].line(0)
