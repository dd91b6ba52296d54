"""Linear layers whose frozen weights are kept in 4 or 8 bits (QLoRA: Dettmers et al. 2023), by bitsandbytes.

Shapes: N outputs, M inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fm9g.lora.inject import linear_layers
from fm9g.packages import import_bitsandbytes

_BLOCK = 64  # values of a weight that share a scale, in 4 bits


class QuantizedLinear(nn.Linear):
    """A linear layer without a weight of its own: `weight` is made from a few bits whenever it is asked for.

    It is no parameter, so that no engine shards or converts it; each process keeps all of it. bitsandbytes' own layers
    are not used: on CPUs with AVX512-BF16 an evaluation has them repack their weights for good.
    """

    def __init__(self, plain: nn.Linear, kind: str, double: bool) -> None:
        """kind: nf4, fp4 or int8. double: the scales of 4-bit weights are quantized, too."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
        self.wanted_shape = torch.Size([plain.out_features, plain.in_features])
        self._kind, self._double = kind, double
        self._bits: torch.Tensor | None = None
        self._scales: Any = None
        self._dtype = torch.float32

    def keep(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """Takes the values (N, M), fp32, on the device; dtype: of the computation."""
        from bitsandbytes import functional

        self._dtype = dtype
        if self._kind == "int8":
            self._bits, self._scales, _ = functional.int8_vectorwise_quant(weight.half())
        else:
            self._bits, self._scales = functional.quantize_4bit(
                weight.to(dtype), blocksize=_BLOCK, compress_statistics=self._double, quant_type=self._kind
            )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(N, M), of the computation's type."""
        from bitsandbytes import functional

        if self._bits is None:
            return torch.empty(self.wanted_shape, device="meta")
        if self._kind == "int8":
            return functional.int8_vectorwise_dequant(self._bits, self._scales).to(self._dtype)
        return functional.dequantize_4bit(self._bits, self._scales).to(self._dtype)

    @property
    def nbytes(self) -> int:
        """What it takes in memory, its bias aside."""
        state = self._scales
        tensors = [self._bits, state] if self._kind == "int8" else [self._bits, state.absmax]
        if self._kind != "int8" and state.nested:
            tensors += [state.state2.absmax, state.state2.code]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Frozen.apply(x, self, self.bias)  # type: ignore[no-untyped-call]


class _Frozen(torch.autograd.Function):
    """x W^T + bias, W made anew in the backward pass: kept from the forward pass, all layers' would fill the memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad @ ctx.layer.weight, None, None


def quantize_layers(layers: nn.ModuleList, kind: str, double: bool) -> None:
    """Puts a QuantizedLinear in the place of each linear layer inside a model's layers, before `inject`.

    Raises UserError where bitsandbytes is not installed.
    """
    import_bitsandbytes("quantization")
    for name, plain in linear_layers(layers, prefix="").items():
        owner, _, key = name.rpartition(".")
        setattr(layers.get_submodule(owner), key, QuantizedLinear(plain, kind, double))
