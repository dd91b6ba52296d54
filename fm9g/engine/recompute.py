"""Activation checkpointing from outside: a layer keeps less of its forward pass and computes it again later."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What "selective" keeps: outputs that cost a matrix product to compute again.
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def recompute(module: torch.nn.Module, how: str) -> None:
    """how: none; selective, all but matrix products and attention is computed again; full, everything is.

    The module's forward is replaced, so that no name changes.
    """
    if how == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    module.forward = functools.partial(checkpoint, module.forward, **settings)  # type: ignore[method-assign]


def _keep(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    flash = getattr(operation, "namespace", "") in ("flash_attn", "torch_attn")
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT or flash else CheckpointPolicy.PREFER_RECOMPUTE
