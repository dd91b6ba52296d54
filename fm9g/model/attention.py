"""Causal attention over a packed row: every document attends to itself alone, all of it or a sliding window.

Shapes: T tokens, H query heads, K key and value heads, D width of a head. L tokens of a document, W of a window.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from fm9g.model.padding import pad_rows

_SEQLEN_MULTIPLE = 64  # of which the tokens of a document are a multiple, see pad_rows
_QUERY_CHUNK = 1024  # of a document that are compared with the keys of their windows at a time


@cache
def flash_attn_kernel() -> Any:
    """flash-attn's kernel for packed rows, or None where the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def varlen_operators() -> Any:
    """What torch.nn.attention.varlen is made of, forward and backward; None in a torch without it."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return None
    return torch.ops.torch_attn


def packed_kernel(query: torch.Tensor, key: torch.Tensor, flash: bool) -> str:
    """What attends over a whole packed row of such tensors at once: flash_attn, varlen (torch's own); "": nothing does.

    flash: kernels are wanted at all. All of them are for half precision on a GPU; torch's is for one of compute
    capability 8.0 or newer, and heads up to 256 wide, in steps of 8.
    """
    if not flash or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return ""
    if flash_attn_kernel():
        return "flash_attn"
    rows = [tensor.transpose(0, 1)[None] for tensor in (query, key, key)]
    grouped = query.shape[1] != key.shape[1]
    fits = query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(
        torch.backends.cuda.SDPAParams(*rows, None, 0.0, True, grouped)  # type: ignore[arg-type, call-arg]
    )
    return "varlen" if fits and varlen_operators() else ""


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seqlens: list[int],
    flash: bool,
    scale: float | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Attention of query (T, H, D) over key and value (T, K, D); returns (T, H, D).

    cu_seqlens: (documents + 1,) int32 borders on the tensors' device; seqlens: the same documents' lengths on the host.
    flash: use a kernel for packed rows where there is one for these tensors, see packed_kernel.
    scale: of the products of queries and keys; None: 1 / sqrt(D).
    window: the tokens of its document that a token attends to, itself and those right before it; 0: all before it.
    """
    kernel = packed_kernel(query, key, flash)
    window_size = (window - 1, 0) if window else (-1, 0)  # tokens before and after a query
    if kernel == "flash_attn":
        max_seqlen = max(seqlens)
        # Deterministic: else its backward pass adds in an order that differs from run to run.
        return flash_attn_kernel()(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=scale,
            causal=True,
            window_size=window_size if window else (-1, -1),
            deterministic=True,
        )
    if kernel == "varlen":
        return _Varlen.apply(query, key, value, cu_seqlens, max(seqlens), scale, window_size)  # type: ignore[no-untyped-call]
    # One call a document costs the sum of the squared lengths; one call with a mask, the square of the sum.
    documents = zip(query.split(seqlens), key.split(seqlens), value.split(seqlens))
    return torch.cat([part for document in documents for part in _document_attention(*document, scale, window)])


class _Varlen(torch.autograd.Function):
    """torch.nn.attention.varlen.varlen_attn, with a backward pass that adds in the same order every time.

    That is not to be had from outside: what a layer recomputes runs inside its backward pass, and has operators that
    know no fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        ctx.sizes = max_seqlen, max_seqlen, window_size == (-1, 0)
        ctx.scale, ctx.window_size = scale, list(window_size)
        output, logsumexp, rng_state = varlen_operators()._varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, *ctx.sizes, ctx.scale, ctx.window_size
        )
        ctx.save_for_backward(query, key, value, output, logsumexp, cu_seqlens, rng_state)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        *tensors, cu_seqlens, rng_state = ctx.saved_tensors
        before = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            grads = varlen_operators()._varlen_attn_backward(
                grad.contiguous(), *tensors, cu_seqlens, cu_seqlens, *ctx.sizes, rng_state, ctx.scale, ctx.window_size
            )
        finally:
            torch.set_deterministic_debug_mode(before)
        return *grads, None, None, None, None


def _document_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
) -> list[torch.Tensor]:
    """The attention of one document, (L, H, D), in parts to be joined. With a window its cost grows with L, not L^2."""
    length = len(query)
    if not window or length <= window:
        return [_scaled_dot_product(query, key, value, scale)]
    parts = []
    for start in range(0, length, _QUERY_CHUNK):
        end = min(start + _QUERY_CHUNK, length)
        key_start = max(0, start - window + 1)  # of the keys that these queries see
        distances = torch.arange(start, end, device=query.device)[:, None] - torch.arange(
            key_start, end, device=query.device
        )
        mask = (distances >= 0) & (distances < window)
        parts.append(_scaled_dot_product(query[start:end], key[key_start:end], value[key_start:end], scale, mask))
    return parts


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """mask: (queries, keys), which keys a query attends to; None: it and all before it."""
    queries, keys = len(query), len(key)
    query, key, value = (pad_rows(tokens, _SEQLEN_MULTIPLE) for tokens in (query, key, value))
    if mask is not None:
        mask = F.pad(mask, (0, len(key) - keys, 0, len(query) - queries))
        mask[queries:, 0] = True  # a softmax over nothing is not a number, and neither are its gradients
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)[:queries]
