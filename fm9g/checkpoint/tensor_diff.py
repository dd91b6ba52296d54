"""Figures of the tensors of weight files: of one alone, and of how two differ.

Tensors are mapped from the disk and looked at one at a time, in pieces, so that memory stays small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.checkpoint import ProgressCallback
from fm9g.errors import UserError
from fm9g.io.weights import read_weights

_CHUNK_ELEMENTS = 1 << 22  # values that are looked at at a time: as doubles, 32 MiB


@dataclass(frozen=True)
class WeightStats:
    """Of the finite values of a tensor; None where it has none. std: of the population."""

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
    """Between two tensors a and b of a shape. max_abs: of |a - b|. relative: |a - b| / |a| in the L2 norm.

    relative, cosine: nan where a norm is 0. dtypes: of both, where they are not the same.
    """

    name: str
    max_abs: float
    relative: float
    cosine: float
    dtypes: str


@dataclass(frozen=True)
class TensorDiff:
    """Between two files of tensors. shapes: name, and the shapes of both. deltas: largest first."""

    count: int
    only_a: list[str]
    only_b: list[str]
    shapes: list[tuple[str, list[int], list[int]]]
    deltas: list[TensorDelta]

    @property
    def equal(self) -> bool:
        """Bit for bit, in names, shapes and types too."""
        return not (self.only_a or self.only_b or self.shapes or self.deltas)


def dtype_of(tensor: torch.Tensor) -> str:
    """As `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


def describe_nonfinite(file: Path, tensors: dict[str, torch.Tensor], on_progress: ProgressCallback) -> str:
    """How many values of a file's tensors are not finite, and where, in words; empty where all are."""
    found = {}
    for name, tensor in tensors.items():
        count = 0
        for chunk in _chunks(f"{file}: {name}", tensor):
            # Types of one byte have no isfinite of their own; float() would make infinities of large doubles.
            count += chunk.numel() - int(torch.isfinite(chunk.float() if chunk.itemsize == 1 else chunk).sum())
            on_progress(chunk.nbytes)
        if count:
            found[name] = count
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{sum(found.values())} values are not finite, in {next(iter(found))}{more}" if found else ""


def weight_stats(file: Path, on_progress: ProgressCallback) -> Iterator[WeightStats]:
    """Of every tensor of a file, in its order. on_progress: told of the bytes that are done.

    Mean and squares are merged piece by piece (Chan, Golub, LeVeque 1979), which loses no digits.
    """
    for name, tensor in read_weights(file).items():
        count, mean, squares, lowest, highest = 0, 0.0, 0.0, math.inf, -math.inf
        for chunk in _chunks(f"{file}: {name}", tensor):
            values = chunk.double()
            values = values[values.isfinite()]
            if new := values.numel():
                variance, center = (float(value) for value in torch.var_mean(values, correction=0))
                squares += variance * new + (center - mean) ** 2 * count * new / (count + new)
                mean += (center - mean) * new / (count + new)
                lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
                count += new
            on_progress(chunk.nbytes)
        stats = (mean, math.sqrt(squares / count), lowest, highest) if count else (None,) * 4
        yield WeightStats(name, list(tensor.shape), dtype_of(tensor), tensor.numel() - count, *stats)


def compare_tensors(a: Path, b: Path, on_progress: ProgressCallback) -> TensorDiff:
    """What is different in two files of tensors. on_progress: told of the bytes of a's that are done."""
    ours, theirs = read_weights(a), read_weights(b)
    shapes, deltas = [], []
    for name in (name for name in ours if name in theirs):  # in the order of the file
        one, other = ours[name], theirs[name]
        if one.shape != other.shape:
            shapes.append((name, list(one.shape), list(other.shape)))
        elif one.dtype != other.dtype or not _same_bits(_pairs(a, b, name, one, other)):
            dtypes = "" if one.dtype == other.dtype else f"{dtype_of(one)}, {dtype_of(other)}"
            deltas.append(TensorDelta(name, *_delta(_pairs(a, b, name, one, other)), dtypes))
        on_progress(one.nbytes)
    return TensorDiff(
        count=len(ours.keys() | theirs.keys()),
        only_a=sorted(ours.keys() - theirs.keys()),
        only_b=sorted(theirs.keys() - ours.keys()),
        shapes=sorted(shapes),
        # What is not a number at all comes before the largest.
        deltas=sorted(deltas, key=lambda d: (-math.inf if math.isnan(d.max_abs) else -d.max_abs, d.name)),
    )


Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]


def _same_bits(pairs: Pairs) -> bool:
    return all(torch.equal(mine.view(torch.uint8), yours.view(torch.uint8)) for mine, yours in pairs)


def _delta(pairs: Pairs) -> tuple[float, float, float]:
    """max_abs, relative and cosine of TensorDelta."""
    largest, sums = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for mine, yours in pairs:
        x, y = mine.double(), yours.double()
        gap = x - y
        largest = torch.maximum(largest, gap.abs().max())  # which keeps a nan
        sums += torch.stack([gap.dot(gap), x.dot(x), y.dot(y), x.dot(y)])
    gaps, squares_a, squares_b, product = sums.tolist()
    both = math.sqrt(squares_a) * math.sqrt(squares_b)
    return float(largest), math.sqrt(gaps / squares_a) if squares_a else math.nan, product / both if both else math.nan


def _pairs(a: Path, b: Path, name: str, one: torch.Tensor, other: torch.Tensor) -> Pairs:
    return zip(_chunks(f"{a}: {name}", one), _chunks(f"{b}: {name}", other))


def _chunks(where: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's values in flat, contiguous pieces. Raises UserError for a kind of tensor that has none."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        raise UserError(f"{where}: found {tensor.type()}, expected a plain tensor of real numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # written out, a few bytes could fill the memory
        raise UserError(f"{where}: repeats its values ({list(tensor.shape)} of them); write it out in full")
    if tensor.numel():
        for chunk in tensor.detach().reshape(-1).split(_CHUNK_ELEMENTS):
            yield chunk.contiguous()


def infer_model_config(weights: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The keys of a model configuration that shapes tell; None for weights of something else."""
    embedding = weights.get("input_embedding.weight")
    gate = weights.get("encoder.layers.0.ffn.ffn.w_in.w_0.weight")
    if embedding is None or gate is None or embedding.dim() != 2 or gate.dim() != 2:
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
