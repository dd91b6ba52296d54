"""Models to convert: m.pt with its configuration, and Hugging Face folders of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.common import small_model

from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.io.pt_file import write_weights
from fm9g.model.transformer import weight_shapes


@pytest.fixture
def pt_file(tmp_path: Path) -> Path:
    """m.pt, a model with biases, in bf16."""
    config = small_model(qkv_bias=True)
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in weight_shapes(config).items()}
    write_weights(tmp_path / "m.pt", weights, weights.items())
    (tmp_path / "m.json").write_text(json.dumps(config.to_json()))
    return tmp_path / "m.pt"


@pytest.fixture
def folder(pt_file: Path, tokenizer_path: Path) -> Path:
    """A Hugging Face folder with a tokenizer; m.pt is beside it."""
    folder = pt_file.with_name("hf")
    export_folder(pt_file, folder)
    for file in tokenizer_path.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def sharded_folder(pt_file: Path) -> Path:
    """A Hugging Face folder of several shards, without a tokenizer; m.pt is beside it."""
    export_folder(pt_file, pt_file.with_name("hf"), options=ExportOptions(shard_bytes=20_000))
    return pt_file.with_name("hf")
