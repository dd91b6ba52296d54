"""Curves: running means, bins, and few points."""

import numpy as np
import pytest

from fm9g.report.curves import MAX_POINTS, Curve, binned_means, curve, downsample, running_mean


def test_downsampling_keeps_peaks_and_gaps() -> None:
    values = np.ones(10_000)
    values[1234], values[5678], values[8000:8100] = 99, -99, np.nan
    downsampled = downsample(Curve(np.arange(10_000.0), values))
    assert len(downsampled.values) <= MAX_POINTS
    assert np.nanmax(downsampled.values) == 99
    assert downsampled.steps[np.nanargmin(downsampled.values)] == 5678
    assert np.isnan(downsampled.values[(downsampled.steps > 8010) & (downsampled.steps < 8090)]).all()
    assert (np.diff(downsampled.steps) > 0).all()


def test_the_running_mean_does_not_lag_and_leaves_gaps() -> None:
    steps = np.arange(100.0)
    straight = running_mean(Curve(steps, 5 - steps))
    assert straight.values[:90] == pytest.approx(5 - steps[:90])
    values = np.ones(20)
    values[[3, 10]] = np.nan
    mean = running_mean(Curve(steps[:20], values))
    assert np.flatnonzero(np.isnan(mean.values)).tolist() == [3, 10]
    assert np.nanmax(np.abs(mean.values - 1)) == 0


def test_bins_keep_the_mean_over_steps() -> None:
    metrics = [{"step": step, "Time/data": step % 3, "Time/compute": 1.0} for step in range(2, 2001, 2)]
    metrics.insert(5, {"step": 11, "Loss/val": 1.0})  # no time was taken
    edges, values = binned_means(metrics, ["Time/data", "Time/compute"])
    assert (edges[0], edges[-1]) == (0, 2000)
    assert len(edges) - 1 == values.shape[1] <= 300
    assert (values[0] * np.diff(edges)).sum() == 2 * sum(step % 3 for step in range(2, 2001, 2))
    assert values[1] == pytest.approx(1)
    assert binned_means([{"step": 1}], ["Time/data"])[1].size == 0


def test_a_curve_has_only_what_was_logged() -> None:
    found = curve([{"step": 1, "x": 1}, {"step": 2}, {"step": 3, "x": None}], "x")
    assert found.steps.tolist() == [1, 3]
    assert len(found) == 1
