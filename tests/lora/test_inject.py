"""Adapters in a model, and their names in files."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from helpers.common import small_model

from fm9g.config.adapter import AdapterConfig
from fm9g.lora.inject import A, B, canonical_name, inject_adapters
from fm9g.model.transformer import FM9G


def test_only_adapters_are_trained_and_their_names_are_those_of_files() -> None:
    with torch.device("meta"):
        model = FM9G(small_model(qkv_bias=True))
    before = [name for name, _ in model.named_parameters()]
    targets = inject_adapters(
        model, model.encoder.layers, AdapterConfig(r=2, alpha=2.0, layers=["self_attention.project_q"])
    )
    assert len(targets) == 2
    trained = {canonical_name(name) for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {layer + part for layer in targets for part in (A, B)}
    assert {canonical_name(name) for name, _ in model.named_parameters()} == trained | set(before)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.slow
def test_only_quantization_imports_bitsandbytes() -> None:
    """The import takes seconds. The test runs in a process of its own, where nothing else has imported it."""
    program = """
import sys, torch
from fm9g.config.adapter import AdapterConfig
from fm9g.lora.inject import inject_adapters
from fm9g.lora.quantize import quantize_layers
from fm9g.lora.init import AdapterInit

def adapt(quantize):
    model = torch.nn.Module()
    model.encoder = torch.nn.Module()
    model.encoder.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"x": torch.nn.Linear(4, 4)})])
    if quantize:
        quantize_layers(model.encoder.layers, "nf4", True)
    config = AdapterConfig(r=2, alpha=2.0, layers=["x"], pissa=True)
    chosen = inject_adapters(model, model.encoder.layers, config)
    weight_init = AdapterInit(config, chosen, lambda _: torch.eye(4), "pissa", 1)
    weight_init.init_weight(chosen[0] + ".weight", torch.empty(4, 4))

adapt(quantize=False)
assert not any(name.startswith("bitsandbytes") for name in sys.modules), "imported"
from peft.import_utils import is_bnb_available
assert is_bnb_available(), "hidden from others"
adapt(quantize=True)
assert "bitsandbytes" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
