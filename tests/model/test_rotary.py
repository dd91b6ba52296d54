"""Rotary scalings against those of transformers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.common import make_batch, small_model
from helpers.hf_reference import exported, hf_logits, make_model

from fm9g.config.model import ROPE_SCALINGS


@pytest.mark.parametrize("kind", ROPE_SCALINGS[1:])
def test_rope_scalings_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = small_model(rope_scaling=kind, rope_factor=4.0, max_length=64, orig_max_length=16, head_dim=16)
    model, batch = make_model(config), make_batch()
    plain = make_model(dataclasses.replace(config, rope_scaling=""))
    with torch.no_grad():
        actual = model.logits(batch)
        assert (actual - plain.logits(batch)).abs().max() > 1e-3  # the stretch does something
    torch.testing.assert_close(actual, hf_logits(exported(model, tmp_path), batch), rtol=0, atol=1e-5)
