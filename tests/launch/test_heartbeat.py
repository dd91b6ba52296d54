"""How long a peer was silent, and how the time to end a run is divided."""

from __future__ import annotations

import pytest

from fm9g.launch.heartbeat import HeartbeatTracker, Timing


def test_heartbeats_are_timed_by_the_listener():
    tracker = HeartbeatTracker(now=100.0)
    assert tracker.update(["a", None], 101.0) == [0.0, 1.0]
    assert tracker.update(["a", None], 104.0) == [3.0, 4.0]
    assert tracker.update(["b", "a"], 105.0) == [0.0, 0.0]


@pytest.mark.parametrize("timeout", [2.0, 6.0, 60.0, 600.0])
def test_the_parts_of_ending_fit_into_the_timeout(timeout: float):
    timing = Timing(timeout)
    # Workers end, are killed, and all agents hear of it.
    assert timing.grace_period + 3 * timing.heartbeat_interval <= timing.settle_time * 1.3
    assert timing.heartbeat_timeout + 2 * timing.heartbeat_interval + timing.settle_time <= timeout
