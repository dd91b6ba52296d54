"""Activation checkpointing from outside: a layer keeps less of its forward pass and computes it again later."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What "selective" keeps: outputs that cost a matrix product to compute again.
_SAVED_OPS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def apply_activation_checkpointing(module: torch.nn.Module, mode: str) -> None:
    """mode: none; selective, all but matrix products and attention is computed again; full, everything is.

    The module's forward is replaced, so that no name changes.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _sac_policy)
    module.forward = functools.partial(checkpoint, module.forward, **options)  # type: ignore[method-assign]


def _sac_policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    flash = getattr(op, "namespace", "") in ("flash_attn", "torch_attn")
    return CheckpointPolicy.MUST_SAVE if op in _SAVED_OPS or flash else CheckpointPolicy.PREFER_RECOMPUTE
