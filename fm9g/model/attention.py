"""Causal attention over a packed row: every token attends to its own document, to all of it or to a sliding window.

    row:  | document 1   | document 2 | doc 3 |        a query sees, with window 3 in a document of 5 tokens:
          0              7           12      15           keys 0 1 2 3 4
    cu_seqlens = [0, 7, 12, 15]                        query 0 x
    seqlens    = [7, 5, 3]                                   1 x x
                                                             2 x x x
                                                             3   x x x
                                                             4     x x x

Shape suffixes: T tokens of a packed row, H query heads, K key and value heads, D width of a head, L tokens of a
document.
"""

# ruff: noqa: N803, N806 (shape suffixes)

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from fm9g.model.padding import pad_rows


@cache
def flash_attn_kernel() -> Any:
    """flash-attn's kernel for packed rows; None if the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def varlen_operators() -> Any:
    """The operators behind torch.nn.attention.varlen, forward and backward; None in a torch without it."""
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return None
    return torch.ops.torch_attn


def packed_kernel(q_THD: torch.Tensor, k_TKD: torch.Tensor, flash: bool) -> str:
    """The kernel that computes a packed row of such tensors in one call: flash_attn, varlen (torch's own) or "" (none).

    Both need half precision on a GPU; torch's needs compute capability 8.0, and heads up to 256 wide, a multiple of 8.

    Args:
        flash: whether such a kernel is wanted.
    """
    if not flash or not q_THD.is_cuda or q_THD.dtype not in (torch.bfloat16, torch.float16):
        return ""
    if flash_attn_kernel():
        return "flash_attn"
    rows = [tensor.transpose(0, 1)[None] for tensor in (q_THD, k_TKD, k_TKD)]
    is_grouped = q_THD.shape[1] != k_TKD.shape[1]
    fits = q_THD.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(
        torch.backends.cuda.SDPAParams(*rows, None, 0.0, True, is_grouped)  # type: ignore[arg-type, call-arg]
    )
    return "varlen" if fits and varlen_operators() else ""


def varlen_attention(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    seqlens: list[int],
    flash: bool,
    scale: float | None = None,
    window: int = 0,
) -> torch.Tensor:
    """Attention of a packed row, by one kernel call where there is a kernel, else document by document.

    Args:
        cu_seqlens: (documents + 1,) int32 borders of documents, on the tensors' device.
        seqlens: lengths of the same documents, on the host.
        flash: whether to use a kernel, see `packed_kernel`.
        scale: factor of the products of queries and keys; None: 1 / sqrt(D).
        window: number of tokens that a token attends to, itself and those right before it; 0: all before it.

    Returns:
        (T, H, D).
    """
    kernel = packed_kernel(q_THD, k_TKD, flash)
    window_size = (window - 1, 0) if window else (-1, 0)  # tokens before and after a query
    if kernel == "flash_attn":
        max_seqlen = max(seqlens)
        # Without `deterministic`, its backward pass adds in an order that differs from run to run.
        output: torch.Tensor = flash_attn_kernel()(
            q_THD,
            k_TKD,
            v_TKD,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=scale,
            causal=True,
            window_size=window_size if window else (-1, -1),
            deterministic=True,
        )
        return output
    if kernel == "varlen":
        output = _Varlen.apply(q_THD, k_TKD, v_TKD, cu_seqlens, max(seqlens), scale, window_size)  # type: ignore[no-untyped-call]
        return output
    return attention_by_document(q_THD, k_TKD, v_TKD, seqlens, scale, window)


class _Varlen(torch.autograd.Function):
    """torch.nn.attention.varlen.varlen_attn, with a backward pass that always adds in the same order.

    torch offers no way to ask for that from outside: `set_deterministic_debug_mode` around the whole backward pass
    would also reach recomputed layers, which contain operators without a deterministic form.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scale: float | None,
        window_size: tuple[int, int],
    ) -> torch.Tensor:
        ctx.sizes = max_seqlen, max_seqlen, window_size == (-1, 0)
        ctx.scale, ctx.window_size = scale, list(window_size)
        out_THD: torch.Tensor
        out_THD, logsumexp, rng_state = varlen_operators()._varlen_attn(
            q_THD, k_TKD, v_TKD, cu_seqlens, cu_seqlens, *ctx.sizes, ctx.scale, ctx.window_size
        )
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, out_THD, logsumexp, cu_seqlens, rng_state)
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: torch.Tensor) -> Any:
        *tensors, cu_seqlens, rng_state = ctx.saved_tensors
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            grads = varlen_operators()._varlen_attn_backward(
                grad_THD.contiguous(),
                *tensors,
                cu_seqlens,
                cu_seqlens,
                *ctx.sizes,
                rng_state,
                ctx.scale,
                ctx.window_size,
            )
        finally:
            torch.set_deterministic_debug_mode(mode)
        return *grads, None, None, None, None


def attention_by_document(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    seqlens: list[int],
    scale: float | None = None,
    window: int = 0,
    *,
    query_chunk: int = 1024,
    seqlen_multiple: int = 64,
) -> torch.Tensor:
    """As `varlen_attention`, with one call per document: its cost grows with the sum of the squared lengths.

    One call for the row, with a mask, would cost the square of the sum.

    Args:
        query_chunk: with a window, queries of a document per call.
        seqlen_multiple: multiple to which the tokens of a call are padded, see `pad_rows`.
    """
    parts: list[torch.Tensor] = []
    for q_LHD, k_LKD, v_LKD in zip(*(torch.split(tensor, seqlens) for tensor in (q_THD, k_TKD, v_TKD))):
        parts += _document_attention(q_LHD, k_LKD, v_LKD, scale, window, query_chunk, seqlen_multiple)
    return torch.cat(parts)


def _document_attention(
    q_LHD: torch.Tensor,
    k_LKD: torch.Tensor,
    v_LKD: torch.Tensor,
    scale: float | None,
    window: int,
    query_chunk: int,
    seqlen_multiple: int,
) -> list[torch.Tensor]:
    """The attention of one document (L, H, D), in chunks of queries. With a window its cost grows with L, not L^2."""
    length = len(q_LHD)
    if not window or length <= window:
        return [_scaled_dot_product(q_LHD, k_LKD, v_LKD, scale, seqlen_multiple)]
    chunks = []
    for start in range(0, length, query_chunk):
        end = min(start + query_chunk, length)
        first_key = max(0, start - window + 1)  # that a query of this chunk attends to
        queries = torch.arange(start, end, device=q_LHD.device)
        keys = torch.arange(first_key, end, device=q_LHD.device)
        distance = queries[:, None] - keys
        mask = (distance >= 0) & (distance < window)
        k_chunk, v_chunk = k_LKD[first_key:end], v_LKD[first_key:end]
        chunks.append(_scaled_dot_product(q_LHD[start:end], k_chunk, v_chunk, scale, seqlen_multiple, mask))
    return chunks


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    seqlen_multiple: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """query (queries, H, D), key and value (keys, K, D); returns (queries, H, D).

    mask: (queries, keys), true where a query attends to a key; None: to itself and all before it.
    """
    queries, keys = len(query), len(key)
    query, key, value = (pad_rows(tokens, seqlen_multiple) for tokens in (query, key, value))
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
