"""Small models of transformers' classes and their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

HF_CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


def make_hf_model(kind: str, changes: dict[str, Any], folder: Path) -> torch.nn.Module:
    """A model of a model_type, whose folder's config.json gets changes before it is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = {**HF_CONFIG, "head_dim": 16}
    plain = AutoConfig.for_model(kind, **config)
    AutoModelForCausalLM.from_config(plain).save_pretrained(folder)
    config |= {"model_type": kind, "architectures": plain.architectures, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
