"""Statistics of the tensors of weight files, of one file and of the differences between two.

Tensors are read one at a time, in chunks, so that memory stays small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.manifest import ProgressCallback
from fm9g.io.lazy_tensor import LazyTensor, TensorMeta, reject_repeated_values
from fm9g.io.pt_file import open_pt

CHUNK_ELEMENTS = 1 << 22  # elements in memory at a time; 32 MiB as float64


@dataclass(frozen=True)
class WeightStats:
    """Statistics of the finite values of a tensor; None if it has none. std: of the population."""

    name: str
    shape: list[int]
    dtype: str
    not_finite: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None


@dataclass(frozen=True)
class TensorDelta:
    """The difference between two tensors a and b of the same shape.

    Attributes:
        name: their name.
        max_abs: max |a - b|.
        relative: |a - b| / |a| in the L2 norm; nan if |a| is 0.
        cosine: of the angle between a and b; nan if a norm is 0.
        dtypes: both types, if they differ.
    """

    name: str
    max_abs: float
    relative: float
    cosine: float
    dtypes: str


@dataclass(frozen=True)
class TensorDiff:
    """The differences between two files of tensors.

    Attributes:
        count: number of different names.
        only_a, only_b: names that one file lacks.
        shapes: name and both shapes, where they differ.
        deltas: of tensors with different values or types, largest first.
    """

    count: int
    only_a: list[str]
    only_b: list[str]
    shapes: list[tuple[str, list[int], list[int]]]
    deltas: list[TensorDelta]

    @property
    def equal(self) -> bool:
        """Whether names, shapes, types and all bits are equal."""
        return not (self.only_a or self.only_b or self.shapes or self.deltas)


def dtype_name(tensor: TensorMeta) -> str:
    """The name of its type, such as `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def describe_nonfinite(tensors: Mapping[str, LazyTensor], on_progress: ProgressCallback) -> str:
    """How many values are not finite, and where, in words; empty if all are finite."""
    counts = {}
    for name, tensor in tensors.items():
        count = 0
        for chunk in _chunks(name, tensor, CHUNK_ELEMENTS):
            # isfinite lacks the one-byte types, and float() would turn large doubles into infinities.
            count += chunk.numel() - int(torch.isfinite(chunk.float() if chunk.itemsize == 1 else chunk).sum())
            on_progress(chunk.nbytes)
        if count:
            counts[name] = count
    more = f" and {len(counts) - 1} more" if len(counts) > 1 else ""
    return f"{sum(counts.values())} values are not finite, in {next(iter(counts))}{more}" if counts else ""


def weight_stats(
    file: Path, on_progress: ProgressCallback, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[WeightStats]:
    """Statistics of every tensor of a file, in its order.

    Args:
        file: a .pt file.
        on_progress: called with a number of further bytes that are done.
        chunk_elements: elements in memory at a time.

    Mean and squares of chunks are merged without loss of digits (Chan, Golub, LeVeque 1979).
    """
    for name, tensor in open_pt(file).items():
        count, mean, sum_sq, lowest, highest = 0, 0.0, 0.0, math.inf, -math.inf
        for chunk in _chunks(name, tensor, chunk_elements):
            values = chunk.double()
            values = values[values.isfinite()]
            if num_values := values.numel():
                variance, center = (float(value) for value in torch.var_mean(values, correction=0))
                sum_sq += variance * num_values + (center - mean) ** 2 * count * num_values / (count + num_values)
                mean += (center - mean) * num_values / (count + num_values)
                lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
                count += num_values
            on_progress(chunk.nbytes)
        stats = (mean, math.sqrt(sum_sq / count), lowest, highest) if count else (None,) * 4
        yield WeightStats(name, list(tensor.shape), dtype_name(tensor), tensor.shape.numel() - count, *stats)


def compare_tensors(
    a: Path, b: Path, on_progress: ProgressCallback, chunk_elements: int = CHUNK_ELEMENTS
) -> TensorDiff:
    """The differences between two .pt files.

    Args:
        a, b: the files.
        on_progress: called with a number of further bytes of `a` that are done.
        chunk_elements: elements of each in memory at a time.
    """
    tensors_a, tensors_b = open_pt(a), open_pt(b)
    shapes, deltas = [], []
    for name in (name for name in tensors_a if name in tensors_b):  # in the order of the file
        one, other = tensors_a[name], tensors_b[name]
        if one.shape != other.shape:
            shapes.append((name, list(one.shape), list(other.shape)))
        elif one.dtype != other.dtype or not _same_bits(_pairs(name, one, other, chunk_elements)):
            dtypes = "" if one.dtype == other.dtype else f"{dtype_name(one)}, {dtype_name(other)}"
            deltas.append(TensorDelta(name, *_delta(_pairs(name, one, other, chunk_elements)), dtypes))
        on_progress(one.nbytes)
    return TensorDiff(
        count=len(tensors_a.keys() | tensors_b.keys()),
        only_a=sorted(tensors_a.keys() - tensors_b.keys()),
        only_b=sorted(tensors_b.keys() - tensors_a.keys()),
        shapes=sorted(shapes),
        # nan sorts before the largest.
        deltas=sorted(deltas, key=lambda d: (-math.inf if math.isnan(d.max_abs) else -d.max_abs, d.name)),
    )


_Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


def _same_bits(pairs: _Pairs) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _delta(pairs: _Pairs) -> tuple[float, float, float]:
    """max_abs, relative and cosine of TensorDelta."""
    max_abs, sums = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for a, b in pairs:
        x, y = a.double(), b.double()
        difference = x - y
        max_abs = torch.maximum(max_abs, difference.abs().max())  # which propagates nan
        sums += torch.stack([difference.dot(difference), x.dot(x), y.dot(y), x.dot(y)])
    sum_sq, sum_sq_a, sum_sq_b, product = sums.tolist()
    norms = math.sqrt(sum_sq_a) * math.sqrt(sum_sq_b)
    relative = math.sqrt(sum_sq / sum_sq_a) if sum_sq_a else math.nan
    return float(max_abs), relative, product / norms if norms else math.nan


def _pairs(name: str, one: LazyTensor, other: LazyTensor, chunk_elements: int) -> _Pairs:
    return zip(_chunks(name, one, chunk_elements), _chunks(name, other, chunk_elements))


def _chunks(name: str, tensor: LazyTensor, elements: int) -> Iterator[torch.Tensor]:
    """A tensor's values in flat chunks. Raises UserError if it repeats its values."""
    reject_repeated_values(name, tensor)
    yield from tensor.flat_chunks(elements)


def infer_model_config(weights: Mapping[str, TensorMeta]) -> dict[str, Any] | None:
    """The keys of a model configuration that follow from the shapes; None if these are not a 9G model's."""
    embedding = weights.get("input_embedding.weight")
    gate = weights.get("encoder.layers.0.ffn.ffn.w_in.w_0.weight")
    if embedding is None or gate is None or len(embedding.shape) != 2 or len(gate.shape) != 2:
        return None
    layers = {match[1] for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return {
        "vocab_size": embedding.shape[0],
        "dim_model": embedding.shape[1],
        "dim_ff": gate.shape[0],
        "num_layers": len(layers),
        "qkv_bias": "encoder.layers.0.self_att.self_attention.project_q.bias" in weights,
        "tie_lm_head": "lm_head.weight" not in weights,
    }
