"""Adapters and models with random values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from helpers.common import make_batch, small_model
from torch import nn

from fm9g.config.adapter import AdapterConfig
from fm9g.lora.adapter_file import Adapter
from fm9g.lora.inject import MAGNITUDE, A, B
from fm9g.model.transformer import FM9G

LAYERS = ["project_q", "w_0", "w_out"]


def make_adapter(model: FM9G, seed: int = 0, path: Path = Path("a.pt"), **changes: object) -> Adapter:
    """An adapter with random values. changes: fields of AdapterConfig."""
    config = AdapterConfig(**{"r": 3, "alpha": 6.0, "layers": LAYERS, **changes})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in config.layers:
            rows, columns = module.weight.shape
            weights[name + A] = torch.randn(config.r, columns, generator=generator) * 0.1
            weights[name + B] = torch.randn(rows, config.r, generator=generator) * 0.1
            if config.dora:
                weights[name + MAGNITUDE] = module.weight.detach().norm(dim=1) * 1.1
    return Adapter(config, weights, path)


def make_model(seed: int = 1, **changes: object) -> FM9G:
    model = FM9G(small_model(**changes)).eval()
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed)
    return model.requires_grad_(False)


def logits(model: FM9G, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of one document. ids: its tokens; None: 40 of them."""
    batch = make_batch([40] if ids is None else [len(ids)])
    with torch.no_grad():
        return model.logits(batch if ids is None else replace(batch, input_ids=ids))
