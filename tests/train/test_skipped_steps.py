"""Skipped steps: which they are, and when they end a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fm9g.errors import UserError
from fm9g.train.skipped_steps import SkippedStepDetector


def make_detector(max_consecutive: int, scale: float = 1.0, growth_interval: int = 0) -> SkippedStepDetector:
    engine: Any = SimpleNamespace(loss_scaler=SimpleNamespace(scale=scale, growth_interval=growth_interval))
    return SkippedStepDetector(engine, max_consecutive)


def add(detector: SkippedStepDetector, *norms: float, oom: bool = False) -> None:
    for step, norm in enumerate(norms, 1):
        detector.add(step, [], torch.tensor(norm), oom)


def test_steps_without_a_finite_norm_are_skipped() -> None:
    detector = make_detector(2)
    add(detector, 1.0, float("nan"), 2.0, float("inf"))
    assert [(skipped.step, skipped.reason, skipped.oom) for skipped in detector.poll(wait=True)] == [
        (2, "the norm of the gradients is nan", False),
        (4, "the norm of the gradients is inf", False),
    ]
    assert detector.consecutive == 1
    detector.raise_if_too_many()
    add(detector, float("nan"))
    assert len(list(detector.poll(wait=False))) == 1
    with pytest.raises(UserError, match=r"2 steps in a row were skipped, the last because the norm .* lower lr"):
        detector.raise_if_too_many()


def test_an_overflow_under_loss_scaling_is_no_skipped_step_until_the_scale_is_1() -> None:
    for scale, skipped in ((2.0, 0), (1.0, 1)):
        detector = make_detector(2, scale, growth_interval=10)
        add(detector, float("inf"))
        assert len(list(detector.poll(wait=True))) == skipped


def test_running_out_of_memory_is_named_and_advised_on() -> None:
    detector = make_detector(1, scale=2.0, growth_interval=10)
    add(detector, float("nan"), oom=True)
    (skipped,) = detector.poll(wait=True)
    assert (skipped.reason, skipped.oom) == ("it did not fit in memory", True)
    with pytest.raises(UserError, match=r"it did not fit in memory .* lower batch_size"):
        detector.raise_if_too_many()
