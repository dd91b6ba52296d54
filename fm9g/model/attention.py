"""Causal attention over a packed row: every document attends to itself alone.

Shapes: T tokens, H query heads, K key and value heads, D width of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F


@cache
def flash_attn_kernel() -> Any:
    """flash-attn's kernel for packed rows, or None where the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: list[int],
    flash: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of query (T, H, D) over key and value (T, K, D); returns (T, H, D).

    cu_seqlens: (documents + 1,) int32 borders on the tensors' device; lengths: the same documents' lengths on the host.
    flash: use flash-attn where the tensors are half precision on a GPU and the package is there.
    scale: of the products of queries and keys; None: 1 / sqrt(D).
    """
    if flash and query.is_cuda and query.dtype != torch.float32 and (kernel := flash_attn_kernel()):
        longest = max(lengths)
        # Deterministic: else its backward pass adds in an order that differs from run to run.
        return kernel(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            softmax_scale=scale,
            causal=True,
            deterministic=True,
        )
    # One call a document costs the sum of the squared lengths; one call with a mask, the square of the sum.
    grouped = query.shape[1] != key.shape[1]
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
    outputs = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=grouped,
        )[0].transpose(0, 1)
        for q, k, v in documents
    ]
    return torch.cat(outputs)
