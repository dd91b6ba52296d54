"""Attention of a packed row: which kernel computes it, and sliding windows without a kernel.

The choice of a kernel is tested with tensors that only claim to be on a GPU.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.common import LENGTHS

from fm9g.model import attention


class OnGPU(torch.Tensor):
    is_cuda = True  # type: ignore[assignment]


def on_gpu(heads: int, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(4, heads, width, dtype=dtype).as_subclass(OnGPU)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A torch whose flash attention accepts all tensors, without flash-attn. Returns what torch was asked about."""
    questions: list[Any] = []
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda about: questions.append(about) or True)
    monkeypatch.setattr(attention, "flash_attn_kernel", lambda: None)
    monkeypatch.setattr(attention, "varlen_operators", Operators)
    return questions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_uses_torchs_kernel(dtype: torch.dtype, asked: list[Any]) -> None:
    assert attention.packed_kernel(on_gpu(8, dtype=dtype), on_gpu(2, dtype=dtype), flash=True) == "varlen"
    assert [tuple(asked[0].query.shape), tuple(asked[0].key.shape)] == [(1, 8, 4, 64), (1, 2, 4, 64)]
    assert asked[0].enable_gqa
    assert asked[0].is_causal


def test_flash_attn_is_preferred_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "flash_attn_kernel", lambda: print)
    assert attention.packed_kernel(on_gpu(8), on_gpu(8), flash=True) == "flash_attn"


@pytest.mark.parametrize("why", ["not wanted", "fp32", "cpu", "width", "gpu", "missing"])
def test_else_torch_attends_document_by_document(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = on_gpu(8, 36 if why == "width" else 64, torch.float32 if why == "fp32" else torch.bfloat16)
    if why == "cpu":
        query = query.as_subclass(torch.Tensor)
    if why == "gpu":
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: False)
    if why == "missing":
        monkeypatch.setattr(attention, "varlen_operators", lambda: None)
    assert attention.packed_kernel(query, query, flash=why != "not wanted") == ""


class Operators:
    """Replaces torch's operators, and records each call with the deterministic mode."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def _varlen_attn(self, query: torch.Tensor, key: Any, value: Any, *others: Any) -> Any:
        self.calls.append((*others, torch.get_deterministic_debug_mode()))
        return query * 2, torch.zeros(1), torch.zeros(1)

    def _varlen_attn_backward(self, grad: torch.Tensor, query: Any, key: torch.Tensor, value: Any, *others: Any) -> Any:
        self.calls.append((*others[4:], torch.get_deterministic_debug_mode()))
        if grad.isnan().any():
            raise RuntimeError("out of memory")
        return grad * 3, torch.ones_like(key), torch.ones_like(key)


@pytest.mark.parametrize(("window", "causal", "seen"), [(0, True, [-1, 0]), (3, False, [2, 0])])
def test_torchs_kernel_gets_borders_and_window_and_adds_in_one_order(
    window: int, causal: bool, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    operators, borders = Operators(), torch.tensor([0, 1, 4], dtype=torch.int32)
    monkeypatch.setattr(attention, "packed_kernel", lambda *_: "varlen")
    monkeypatch.setattr(attention, "varlen_operators", lambda: operators)
    query, key = (torch.randn(4, heads, 8, requires_grad=True) for heads in (4, 2))
    attention.varlen_attention(query, key, key, borders, [1, 3], True, 0.5, window).sum().backward()
    forward, backward = operators.calls
    assert all(given is borders for given in forward[:2])
    assert forward[2:] == (3, 3, causal, 0.5, seen, 0)
    assert backward[0:3] == (3, 3, causal)
    assert backward[4:] == (0.5, seen, 2)
    assert torch.equal(query.grad, torch.full_like(query, 3.0))
    assert torch.equal(key.grad, torch.full_like(key, 2.0))
    with pytest.raises(RuntimeError, match="out of memory"):
        attention.varlen_attention(query, key, key, borders, [1, 3], True, 0.5, window).backward(
            torch.full_like(query, torch.nan)
        )
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.parametrize("query_chunk", [1, 5, 8, 13])
def test_the_size_of_query_chunks_changes_no_window(query_chunk: int) -> None:
    query, key, value = (torch.randn(sum(LENGTHS), heads, 8) for heads in (4, 2, 2))
    expected = attention.attention_by_document(query, key, value, LENGTHS, window=8)
    chunked = attention.attention_by_document(query, key, value, LENGTHS, window=8, query_chunk=query_chunk)
    torch.testing.assert_close(chunked, expected, rtol=0, atol=1e-5)


def test_the_cost_of_a_window_grows_with_the_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[int] = []
    plain = F.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        pairs.append(query.shape[-2] * key.shape[-2])
        return plain(query, key, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    costs = []
    for length in (320, 640, 1280):
        pairs.clear()
        q = torch.randn(length, 2, 8)
        attention.attention_by_document(q, q, q, [length], window=24, query_chunk=16)
        costs.append(sum(pairs))
    assert costs[2] - costs[1] == pytest.approx(2 * (costs[1] - costs[0]))
