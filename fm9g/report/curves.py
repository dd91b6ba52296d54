"""Curves from a run's metrics: values by step, running means, and few enough points to draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fm9g.run_files import finite_or_none

MAX_POINTS = 2000  # per curve: more than a screen has columns
_MAX_BINS = 300


@dataclass(frozen=True)
class Curve:
    """(N,) steps and (N,) values; values that were not finite are NaN. The length counts the finite ones."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return int(np.isfinite(self.values).sum())

    def after(self, step: float) -> Curve:
        """The part of the curve after a step."""
        keep = self.steps > step
        return Curve(self.steps[keep], self.values[keep])


def curve(metrics: list[dict[str, Any]], key: str) -> Curve:
    """The values of a metric at the steps where it was logged."""
    lines = [line for line in metrics if key in line]
    values = [finite_or_none(line[key]) for line in lines]
    return Curve(
        np.array([line["step"] for line in lines], float),
        np.array([np.nan if value is None else value for value in values], float),
    )


def running_mean(curve: Curve) -> Curve:
    """The mean of each value and its neighbours; a missing value stays a gap.

    There are up to five neighbours on either side, in a long curve half a percent of it. Near the start the window is
    symmetric, so that the mean follows the first fall of a loss:

        values   a  b  c  d  e  f  g         radius 2
        windows [a]
                [a  b  c]
                [a  b  c  d  e] ...
    """
    count = len(curve.values)
    indices, radius = np.arange(count), max(min(5, count // 20), count // 200)
    start = np.maximum(0, indices - radius)
    end = np.minimum(count, indices + np.minimum(radius, indices) + 1)
    known = np.isfinite(curve.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, curve.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    means = (sums[end] - sums[start]) / np.maximum(1, counts[end] - counts[start])
    return Curve(curve.steps, np.where(known, means, np.nan))


def downsample(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """At most `max_points` points of a curve: the minimum and maximum of each bin, so that no peak is lost."""
    count = len(curve.values)
    if count <= max_points:
        return curve
    length = -(-count // (max_points // 2))  # of a bin
    values = np.concatenate([curve.values, np.full(-count % length, np.nan)]).reshape(-1, length)
    known = np.isfinite(values)
    # argmin of an empty bin is its first point, a NaN, so a gap stays a gap.
    extremes = [np.where(known, values, np.inf).argmin(1), np.where(known, values, -np.inf).argmax(1)]
    indices = np.unique(np.concatenate(extremes) + np.tile(np.arange(len(values)) * length, 2))
    return Curve(curve.steps[indices], curve.values[indices])


def binned_means(metrics: list[dict[str, Any]], keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N + 1,) steps that bound N bins, and (keys, N) the mean of each metric in each bin.

    A logged value is a mean over the steps since the line before. Missing values count as 0.
    """
    lines = [line for line in metrics if any(finite_or_none(line.get(key)) is not None for key in keys)]
    ends = np.array([line["step"] for line in lines], float)
    values = np.array([[finite_or_none(line.get(key)) or 0.0 for line in lines] for key in keys])
    if not lines:
        return np.zeros(1), values.reshape(len(keys), 0)
    first = ends[0] - (ends[1] - ends[0] if len(ends) > 1 else 1)
    edges = np.concatenate([[max(0.0, first) if ends[0] > 0 else first], ends])
    weights = np.diff(edges)
    bins = np.array_split(np.arange(len(lines)), min(len(lines), _MAX_BINS))
    means = [(values[:, part] * weights[part]).sum(1) / weights[part].sum() for part in bins]
    return np.array([edges[0], *(edges[part[-1] + 1] for part in bins)]), np.array(means).T
