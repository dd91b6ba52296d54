"""Activation checkpointing: a layer stores less of its forward pass and recomputes it in its backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Outputs that "selective" stores: recomputing them would cost a matrix product.
_SAVED_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def apply_activation_checkpointing(module: torch.nn.Module, mode: str) -> None:
    """Replaces a module's forward by one with checkpointing, so that no name in the model changes.

    Args:
        mode: none; selective: everything but matrix products and attention is recomputed; full: everything is.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _sac_policy)
    module.forward = functools.partial(checkpoint, module.forward, **options)


def _sac_policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    flash = getattr(op, "namespace", "") in ("flash_attn", "torch_attn")
    return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS or flash else CheckpointPolicy.PREFER_RECOMPUTE
