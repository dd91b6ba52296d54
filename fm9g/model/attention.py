"""Causal attention over a packed row: every document attends to itself alone, all of it or a sliding window.

Shapes: T tokens, H query heads, K key and value heads, D width of a head. L tokens of a document, W of a window.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

_QUERIES = 1024  # of a document that are compared with the keys of their windows at a time


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
    window: int = 0,
) -> torch.Tensor:
    """Attention of query (T, H, D) over key and value (T, K, D); returns (T, H, D).

    cu_seqlens: (documents + 1,) int32 borders on the tensors' device; lengths: the same documents' lengths on the host.
    flash: use flash-attn where the tensors are half precision on a GPU and the package is there.
    scale: of the products of queries and keys; None: 1 / sqrt(D).
    window: the tokens of its document that a token attends to, itself and those right before it; 0: all before it.
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
            window_size=(window - 1, 0) if window else (-1, -1),
            deterministic=True,
        )
    # One call a document costs the sum of the squared lengths; one call with a mask, the square of the sum.
    documents = zip(query.split(lengths), key.split(lengths), value.split(lengths))
    return torch.cat([part for document in documents for part in _document(*document, scale, window)])


def _document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
) -> list[torch.Tensor]:
    """The attention of one document, (L, H, D), in parts to be joined. With a window its cost grows with L, not L^2."""
    length = len(query)
    if not window or length <= window:
        return [_scaled_dot_product(query, key, value, scale)]
    parts = []
    for start in range(0, length, _QUERIES):
        end = min(start + _QUERIES, length)
        first = max(0, start - window + 1)  # of the keys that these queries see
        ages = torch.arange(start, end, device=query.device)[:, None] - torch.arange(first, end, device=query.device)
        seen = (ages >= 0) & (ages < window)
        parts.append(_scaled_dot_product(query[start:end], key[first:end], value[first:end], scale, seen))
    return parts


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """seen: (queries, keys), which keys a query attends to; None: it and all before it."""
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)
