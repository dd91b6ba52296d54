"""Padding: few sizes of matrix products where each new size compiles a kernel, and the same results."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.common import make_batch, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from fm9g.model.attention import attention_by_document
from fm9g.model.loss import LossConfig, linear_cross_entropy
from fm9g.model.padding import pad_rows
from fm9g.model.transformer import FM9G

_PRODUCTS = ("mm", "bmm", "addmm", "_scaled_dot_product_flash_attention_for_cpu")


class Products(TorchDispatchMode):
    """Records the sizes of all matrix products and attentions within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.removesuffix("_backward") in _PRODUCTS:
            self.sizes.add((str(func), *(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))))
        return func(*args, **kwargs or {})


def sizes_of_steps(dtype: torch.dtype, steps: int, first: int = 0) -> set[tuple]:
    model = FM9G(small_model()).to(dtype)
    with Products() as products:
        for step in range(first, first + steps):
            rng, seqlens = random.Random(step), []
            while sum(seqlens) < 256:
                seqlens.append(min(rng.randint(1, 120), 256 - sum(seqlens)))
            model(make_batch(seqlens, seed=step))[0].backward()
    return products.sizes


def test_after_some_steps_no_half_precision_product_has_a_new_size() -> None:
    known = sizes_of_steps(torch.bfloat16, 10)
    assert sizes_of_steps(torch.bfloat16, 20, first=10) <= known
    assert len(sizes_of_steps(torch.float32, 10)) > 2 * len(known)  # in fp32 nothing is padded


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100])
@pytest.mark.parametrize("window", [0, 7, 64])
def test_padding_changes_no_attention(length: int, window: int) -> None:
    results = []
    for multiple in (1, 64):
        torch.manual_seed(0)
        tensors = [torch.randn(length, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
        output = attention_by_document(*tensors, [length], window=window, query_chunk=30, seqlen_multiple=multiple)
        output.float().square().sum().backward()
        results.append([output, *(tensor.grad for tensor in tensors)])
    for plain, padded in zip(*results):
        assert padded.isfinite().all()
        torch.testing.assert_close(padded.float(), plain.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 130])
def test_padding_changes_no_loss(rows: int) -> None:
    loss_config, results = LossConfig(label_smoothing=0.1, z_loss=1e-3), []
    for multiple in (1, 128):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(count, 32).bfloat16().requires_grad_() for count in (rows, 320))
        targets, target_weights = torch.arange(rows) % 320, torch.rand(rows)
        total, each = linear_cross_entropy(hidden, weight, targets, loss_config, target_weights, row_multiple=multiple)
        total.backward()
        results.append([total, each, hidden.grad, weight.grad])
    for plain, padded in zip(*results):
        torch.testing.assert_close(padded.float(), plain.float(), rtol=2e-2, atol=2e-2)


def test_rows_are_padded_where_it_pays() -> None:
    rows = torch.ones(5, 2, 3, dtype=torch.bfloat16)
    padded = pad_rows(rows, 4)
    assert padded.shape == (8, 2, 3)
    assert padded[:5].equal(rows)
    assert not padded[5:].any()
    for same in (rows[:4], rows.float(), rows.to("meta")):
        assert pad_rows(same, 4) is same
