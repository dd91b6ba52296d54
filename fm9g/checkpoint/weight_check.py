"""Checks that the tensors of a file are the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fm9g.errors import UserError
from fm9g.io.lazy_tensor import TensorMeta

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtypes(weights: Mapping[str, TensorMeta], where: str) -> None:
    """Raises UserError for quantized weights and for tensors that are not weights. where: the file, for messages."""
    for name, weight in weights.items():
        if weight.dtype not in _WEIGHT_DTYPES:
            dtype = str(weight.dtype).removeprefix("torch.")
            problem = f"{where}: {name}: found {dtype}, expected fp32, bf16 or fp16"
            if weight.dtype in (torch.bool, torch.int64):
                raise UserError(f"{problem}: it is not a weight; remove it, or get the file again")
            raise UserError(f"{problem}: the model is quantized; use the model that was quantized")


def check_weights(
    weights: Mapping[str, TensorMeta], shapes: Mapping[str, torch.Size], where: str, strict: bool
) -> list[str]:
    """Compares the tensors of a file with the weights of a model.

    Args:
        weights: the tensors of the file.
        shapes: the shape of each weight of the model.
        where: the file, for messages.
        strict: whether missing and unknown names are errors. A wrong shape or type always is one.

    Returns the missing and unknown names, a line each. Raises UserError.
    """
    if not weights.keys() & shapes.keys():
        raise UserError(_not_a_model(weights, shapes, where))
    differences = []
    for problem, names in (
        ("is missing", shapes.keys() - weights.keys()),
        ("is not part of the model", weights.keys() - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"{where}: {min(names)}{more} {problem}")
    check_dtypes({name: weights[name] for name in shapes if name in weights}, where)
    if wrong := [name for name in shapes.keys() & weights.keys() if weights[name].shape != shapes[name]]:
        name = min(wrong)
        others = f" ({len(wrong)} weights differ)" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: {name}: shape {list(weights[name].shape)}, expected {list(shapes[name])}{others}: the file "
            "belongs to another model configuration"
        )
    if differences and strict:
        raise UserError(*differences)
    return differences


def _not_a_model(weights: Mapping[str, TensorMeta], shapes: Mapping[str, torch.Size], where: str) -> str:
    if any(name.endswith(".lora.lora_A") for name in weights):
        return f"{where}: is an adapter, not a model; `fm9g lora merge` merges it into its base"
    names = f"it has {min(weights)}, the model {min(shapes)}" if weights else "it is empty"
    return f"{where}: has no weight of the model ({names}); for a Hugging Face model, give its folder"
