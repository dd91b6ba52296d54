"""Linear layers with weights in few bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fm9g.lora.quantize import QuantizedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "bits", "error"), [("nf4", 4.2, 0.12), ("fp4", 4.2, 0.16), ("int8", 8.1, 0.01)])
def test_a_quantized_layer_is_near_its_weight_and_small(
    dtype: torch.dtype, quant_type: str, bits: float, error: float
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 256)
    layer = QuantizedLinear(plain, quant_type, double_quant=True)
    layer.set_weight(plain.weight.detach(), dtype)
    assert layer.nbytes * 8 / plain.weight.numel() < bits
    x = torch.randn(7, 512, dtype=dtype, requires_grad=True)
    bias = plain.bias.to(dtype)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    out = layer(x)
    assert out.dtype == dtype
    expected = nn.functional.linear(x.float(), plain.weight, plain.bias)
    assert (out.float() - expected).norm() / (expected - plain.bias).norm() < error
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight)
    before = layer.weight
    with torch.no_grad():  # an evaluation has no lasting effect
        layer.eval()(x)
    assert torch.equal(before, layer.weight)


def test_scales_are_quantized_too_on_request() -> None:
    plain = nn.Linear(512, 256, bias=False)
    sizes = []
    for double_quant in (True, False):
        layer = QuantizedLinear(plain, "nf4", double_quant)
        layer.set_weight(plain.weight.detach(), torch.float32)
        sizes.append(layer.nbytes)
    assert sizes[0] < 0.95 * sizes[1]
