"""A small model whose every weight matters, and transformers' class of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fm9g.config.model import ModelConfig
from fm9g.convert.hf_export import export_folder
from fm9g.io.pt_file import write_weights
from fm9g.model.transformer import FM9G, Batch


def make_model(config: ModelConfig) -> FM9G:
    model = FM9G(config)
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=1)
        if weight.dim() == 1:  # norms and biases that do something
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    return model


def hf_logits(folder: Path, batch: Batch) -> torch.Tensor:
    """Logits of transformers' class for each document alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(document[None]).logits[0] for document in batch.input_ids.split(batch.seqlens)])


def exported(model: FM9G, folder: Path) -> Path:
    write_weights(folder / "m.pt", weights := dict(model.named_parameters()), weights.items())
    (folder / "m.json").write_text(json.dumps(model.config.to_json()))
    export_folder(folder / "m.pt", folder / "hf")
    return folder / "hf"
