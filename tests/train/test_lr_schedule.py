"""Every schedule against its formula."""

import math

import pytest

from fm9g.config.train import TrainConfig
from fm9g.train.lr_schedule import learning_rate


def rates(**changes: object) -> list[float]:
    values: dict = {"lr": 2.0, "train_iters": 100, "warmup_iters": 10, "drop_iters": 20}
    config = TrainConfig(**{**values, **changes})
    return [learning_rate(config, n) for n in range(101)]


@pytest.mark.parametrize("name", ["cosine", "warmupstabledrop", "warmupstableexp", "linear", "constant", "noam"])
def test_warmup_is_linear_from_zero(name: str) -> None:
    assert rates(lr_scheduler=name)[:11] == pytest.approx([2.0 * n / 10 for n in range(11)])


def test_cosine_falls_to_a_tenth() -> None:
    for n, rate in enumerate(rates(lr_scheduler="cosine")[10:], 10):
        assert rate == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * (n - 10) / 90))))
    assert rates(lr_scheduler="cosine")[100] == pytest.approx(0.2)


def test_linear_falls_in_a_line_to_the_floor() -> None:
    got = rates(lr_scheduler="linear", min_lr_ratio=0.3)
    assert got[10:] == pytest.approx([2.0 * (1 - 0.7 * (n - 10) / 90) for n in range(10, 101)])
    assert rates(lr_scheduler="linear", min_lr_ratio=0)[100] == 0.0


def test_constant_stays() -> None:
    assert rates(lr_scheduler="constant")[10:] == [2.0] * 91


def test_noam_falls_with_the_root_of_the_steps() -> None:
    assert rates(lr_scheduler="noam")[10:] == pytest.approx([2.0 * math.sqrt(10 / n) for n in range(10, 101)])
    assert rates(lr_scheduler="noam", warmup_iters=0)[:5] == pytest.approx([2, 2, 2 / 2**0.5, 2 / 3**0.5, 1])


def test_the_floor_of_cosine_and_warmupstabledrop_can_be_set() -> None:
    assert rates(lr_scheduler="cosine", min_lr_ratio=0.25)[100] == pytest.approx(0.5)
    assert rates(lr_scheduler="cosine", min_lr_ratio=0.25)[55] == pytest.approx(2.0 * 0.625)
    assert rates(lr_scheduler="warmupstabledrop", min_lr_ratio=0)[90] == pytest.approx(1.0)
    assert rates(lr_scheduler="warmupstabledrop", min_lr_ratio=0)[100] == 0.0


def test_warmupstabledrop_is_flat_and_then_falls_in_a_line() -> None:
    got = rates(lr_scheduler="warmupstabledrop")
    assert got[10:81] == [2.0] * 71
    assert got[81:] == pytest.approx([2.0 * (0.1 + 0.9 * (100 - n) / 20) for n in range(81, 101)])


def test_warmupstableexp_decays_once_begun() -> None:
    got = rates(lr_scheduler="warmupstableexp", drop_begin=40, drop_rate=0.5)
    assert got[10:41] == [2.0] * 31
    assert got[41:] == pytest.approx([2.0 * 0.5 ** ((n - 40) / 20) for n in range(41, 101)])
    assert rates(lr_scheduler="warmupstableexp", drop_begin=-1)[10:] == [2.0] * 91


def test_shares_of_the_run_and_no_warmup() -> None:
    assert rates(warmup_iters=0.1, drop_iters=0.2, lr_scheduler="warmupstabledrop") == rates(
        lr_scheduler="warmupstabledrop"
    )
    assert rates(warmup_iters=0)[0] == 2.0
