"""Models of transformers' classes in folders, with a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.hf_models import make_hf_model


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A folder with a small Qwen2 model and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    make_hf_model("qwen2", {}, folder)
    for file in tokenizer_path.iterdir():
        shutil.copy(file, folder)
    return folder
