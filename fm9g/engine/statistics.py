"""What the values of sharded tensors are like: figures and histograms over all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

BINS = 64
_REACH = 4.0  # root mean squares to either side of 0 that bins cover


@dataclass(frozen=True)
class Statistics:
    """Of one tensor. count: of elements; bad: those that are not finite, which the rest leaves out. largest: absolute.
    counts: (BINS,) in each bin, the outermost with all beyond; edges: (BINS + 1,)."""

    count: int
    bad: int
    sum: float
    squares: float
    largest: float
    counts: np.ndarray
    edges: np.ndarray

    @property
    def rms(self) -> float:
        return (self.squares / max(1, self.count - self.bad)) ** 0.5


@torch.no_grad()
def statistics(
    parts: Sequence[tuple[Callable[[], torch.Tensor], int]],
    add_up: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable[[list[float]], list[list[float]]],
    device: torch.device,
) -> list[Statistics]:
    """Of tensors of which each process holds a part.

    parts: what gives a part, asked twice, and how many processes hold the same. add_up: the sum over processes, in
    place. gather: the values of all processes. All processes must call it alike.
    """
    sums = torch.zeros(len(parts), 4, device=device)
    largest = []
    for row, (find, copies) in zip(sums, parts):
        part = find()
        good = part.isfinite()
        values = part.float().where(good, 0.0)
        size = torch.tensor(float(part.numel()), device=device)
        row.copy_(torch.stack([size, size - good.sum(), values.sum(), values.square().sum()]) / copies)
        largest.append(values.abs().amax() if part.numel() else torch.zeros((), device=device))
    figures = add_up(sums).tolist()
    reach = [max(_REACH * (squares / max(1.0, count - bad)) ** 0.5, 1e-30) for count, bad, _, squares in figures]
    counts = torch.zeros(len(parts), BINS, device=device)
    for row, (find, copies), limit in zip(counts, parts, reach):
        part = find().float()
        values = part[part.isfinite()].clamp(-limit, limit)
        if values.numel():
            row.copy_(torch.histc(values, BINS, -limit, limit) / copies)
    bins = add_up(counts).cpu().numpy()
    tops = np.max(gather(torch.stack(largest).tolist() if largest else []), axis=0)
    return [
        Statistics(round(n), round(bad), total, squares, float(top), bins[i], np.linspace(-limit, limit, BINS + 1))
        for i, ((n, bad, total, squares), limit, top) in enumerate(zip(figures, reach, tops))
    ]
