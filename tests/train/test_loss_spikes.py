"""Jumps of the loss."""

from fm9g.train.loss_spikes import LossSpikeDetector


def test_a_loss_far_above_the_last_ones_is_a_spike() -> None:
    detector = LossSpikeDetector(3.0, min_losses=4)
    assert [detector.add(loss) for loss in (2.0, 2.1, 1.9)] == [None] * 3
    assert detector.add(9.0) is None  # too few losses before it
    calm = LossSpikeDetector(3.0, [2.0, 2.1, 1.9, 2.0], min_losses=4)
    assert calm.add(2.1) is None
    assert calm.add(9.0) == sum([2.0, 2.1, 1.9, 2.0, 2.1]) / 5


def test_a_loss_that_hardly_moves_has_no_spikes_and_zero_sigmas_turn_them_off() -> None:
    assert LossSpikeDetector(3.0, [2.0] * 16).add(2.005) is None
    assert LossSpikeDetector(3.0, [2.0] * 16).add(2.007) is not None
    assert LossSpikeDetector(0.0, [2.0] * 16).add(99.0) is None


def test_only_the_last_losses_count() -> None:
    assert LossSpikeDetector(3.0, [50.0, 1.0, 1.0, 1.0], window=3, min_losses=3).add(5.0) == 1.0
