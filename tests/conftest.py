"""What several test files need: a tokenizer, datasets made on the spot, small models, the shared real data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import ROOT, index_dataset, random_text, write_jsonl

from fm9g.data.encode.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside the project")
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = random.Random(0)
    train_tokenizer((random_text(source, 30) for _ in range(200)), 320, folder)
    return folder


@pytest.fixture
def make_mixture(tmp_path: Path) -> Callable[..., Path]:
    """Writes indexed datasets and a mixture of them: make_mixture({"name": [records]}, name={extra keys})."""

    def make(datasets: dict[str, list[dict]], **extra: dict) -> Path:
        entries = []
        for name, content in datasets.items():
            source = write_jsonl(tmp_path / f"{name}.jsonl", content)
            index_dataset(source, tmp_path / "indexed" / name, "en", overwrite=True)
            entries.append({"task_name": name, "path": f"indexed/{name}", "abs_weight": 1.0, **extra.get(name, {})})
        path = tmp_path / "mixture.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    return make
