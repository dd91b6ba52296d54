"""Linear layers with frozen weights in 4 or 8 bits (QLoRA: Dettmers et al. 2023), by bitsandbytes.

Shapes: N outputs, M inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fm9g.import_utils import import_bitsandbytes
from fm9g.lora.inject import linear_layers

_BLOCK_SIZE = 64  # 4-bit values of a weight that share a scale


class QuantizedLinear(nn.Linear):
    """A linear layer that stores its weight in few bits: `weight` dequantizes it on each access.

    The weight is not a parameter, so that no engine shards or converts it; each process holds all of it. bitsandbytes'
    own layers are not used: on CPUs with AVX512-BF16, an evaluation repacks their weights permanently.
    """

    def __init__(self, linear: nn.Linear, quant_type: str, double_quant: bool) -> None:
        """quant_type: nf4, fp4 or int8. double_quant: whether the scales of 4-bit weights are quantized too."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight_shape = torch.Size([linear.out_features, linear.in_features])
        self._quant_type, self._double_quant = quant_type, double_quant
        self._quantized_weight: torch.Tensor | None = None
        self._quant_state: Any = None
        self._dtype = torch.float32

    def set_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """Quantizes values (N, M), fp32, on the device. dtype: of the computation."""
        from bitsandbytes import functional

        self._dtype = dtype
        if self._quant_type == "int8":
            self._quantized_weight, self._quant_state, _ = functional.int8_vectorwise_quant(weight.half())
        else:
            self._quantized_weight, self._quant_state = functional.quantize_4bit(
                weight.to(dtype),
                blocksize=_BLOCK_SIZE,
                compress_statistics=self._double_quant,
                quant_type=self._quant_type,
            )

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """(N, M), in the dtype of the computation."""
        from bitsandbytes import functional

        if self._quantized_weight is None:
            return torch.empty(self.weight_shape, device="meta")
        is_int8 = self._quant_type == "int8"
        dequantize: Any = functional.int8_vectorwise_dequant if is_int8 else functional.dequantize_4bit
        weight: torch.Tensor = dequantize(self._quantized_weight, self._quant_state).to(self._dtype)
        return weight

    @property
    def nbytes(self) -> int:
        """The memory of the weight, without the bias."""
        state = self._quant_state
        tensors = (
            [self._quantized_weight, state] if self._quant_type == "int8" else [self._quantized_weight, state.absmax]
        )
        if self._quant_type != "int8" and state.nested:
            tensors += [state.state2.absmax, state.state2.code]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _DequantLinearFn.apply(x, self, self.bias)  # type: ignore[no-untyped-call]
        return output


class _DequantLinearFn(torch.autograd.Function):
    """x W^T + bias. The backward pass dequantizes W again: saved from the forward pass, all layers would not fit."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad @ ctx.layer.weight, None, None


def quantize_layers(layers: nn.ModuleList, quant_type: str, double_quant: bool) -> None:
    """Replaces each linear layer inside a model's layers by a QuantizedLinear. Call it before `inject_adapters`.

    Raises UserError if bitsandbytes is not installed.
    """
    import_bitsandbytes("quantization")
    for name, linear in linear_layers(layers, prefix="").items():
        owner, _, key = name.rpartition(".")
        setattr(layers.get_submodule(owner), key, QuantizedLinear(linear, quant_type, double_quant))
