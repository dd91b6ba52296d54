"""Statistics and histograms of sharded tensors, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

NUM_BINS = 64
_RANGE_IN_RMS = 4.0  # the bins reach this many root mean squares to either side of 0


@dataclass(frozen=True)
class TensorStats:
    """Statistics of one tensor.

    Args:
        count: number of elements.
        num_nonfinite: those that are not finite; all other fields leave them out.
        sum, sum_sq, max_abs: of the elements, of their squares, and the largest absolute value.
        counts: (NUM_BINS,) elements per bin; the outermost bins include all elements beyond them.
        edges: (NUM_BINS + 1,) borders of the bins.
    """

    count: int
    num_nonfinite: int
    sum: float
    sum_sq: float
    max_abs: float
    counts: np.ndarray
    edges: np.ndarray


@torch.no_grad()
def compute_tensor_stats(
    shards: Sequence[tuple[Callable[[], torch.Tensor], int]],
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    all_gather_object: Callable[[list[float]], list[list[float]]],
    device: torch.device,
) -> list[TensorStats]:
    """The statistics of tensors of which each process holds a part. All processes must call it with the same tensors.

    Args:
        shards: per tensor, a function that returns this process's part (called twice, so that not all parts need
            memory at once), and the number of processes that hold the same part.
        all_reduce_sum: replaces a tensor by its sum over processes.
        all_gather_object: returns the values of all processes.
    """
    sums = torch.zeros(len(shards), 4, device=device)
    max_abs = []
    for row, (get_shard, num_replicas) in zip(sums, shards):
        shard = get_shard()
        finite = shard.isfinite()
        values = shard.float().where(finite, 0.0)
        size = torch.tensor(float(shard.numel()), device=device)
        row.copy_(torch.stack([size, size - finite.sum(), values.sum(), values.square().sum()]) / num_replicas)
        max_abs.append(values.abs().amax() if shard.numel() else torch.zeros((), device=device))
    totals = all_reduce_sum(sums).tolist()
    limits = [
        max(_RANGE_IN_RMS * (sum_sq / max(1.0, count - num_nonfinite)) ** 0.5, 1e-30)
        for count, num_nonfinite, _, sum_sq in totals
    ]
    counts = torch.zeros(len(shards), NUM_BINS, device=device)
    for row, (get_shard, num_replicas), limit in zip(counts, shards, limits):
        shard = get_shard().float()
        values = shard[shard.isfinite()].clamp(-limit, limit)
        if values.numel():
            row.copy_(torch.histc(values, NUM_BINS, -limit, limit) / num_replicas)
    bins = all_reduce_sum(counts).cpu().numpy()
    maxima = np.max(all_gather_object(torch.stack(max_abs).tolist() if max_abs else []), axis=0)
    return [
        TensorStats(
            round(n), round(num_nonfinite), total, sum_sq, float(top), bins[i], np.linspace(-limit, limit, NUM_BINS + 1)
        )
        for i, ((n, num_nonfinite, total, sum_sq), limit, top) in enumerate(zip(totals, limits, maxima))
    ]
