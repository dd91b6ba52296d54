"""The timer of steps."""

import time

import numpy as np
import pytest
from helpers.engine_harness import CAPACITY, documents

from fm9g.data.load.packing import collate
from fm9g.train.timer import PHASES, StepTimer


def test_time_and_work_are_counted_and_reset() -> None:
    timer = StepTimer()
    packs = [collate(group, CAPACITY) for group in documents(1)]
    with timer.phase("data"):
        time.sleep(0.02)
    timer.count(packs)
    timings = timer.collect_and_reset(communication=5.0)
    assert timings.phases["data"] >= 0.02
    assert timings.seconds >= timings.phases["data"]
    assert timings.phases["communication"] == 5.0
    assert timings.steps == 1
    assert timings.tokens == sum(pack.tokens for pack in packs)
    lengths = np.concatenate([np.diff(pack.cu_seqlens[pack.cu_seqlens <= pack.tokens]) for pack in packs])
    assert timings.sum_sq_seqlens == pytest.approx((lengths.astype(float) ** 2).sum())
    again = timer.collect_and_reset()
    assert (again.steps, again.tokens, again.phases) == (0, 0, dict.fromkeys(PHASES, 0.0))


def test_a_phase_counts_also_when_it_fails() -> None:
    timer = StepTimer()
    with pytest.raises(ValueError), timer.phase("checkpoint"):  # noqa: PT011
        time.sleep(0.01)
        raise ValueError
    assert timer.collect_and_reset().phases["checkpoint"] >= 0.01
