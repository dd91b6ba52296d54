"""Every schedule against its formula."""

import math

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from fm9g.config.fields import keys_of
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.train.lr_schedule import learning_rate


def rates(**changes: object) -> list[float]:
    values: dict = {"lr": 2.0, "train_iters": 100, "warmup_iters": 10, "drop_iters": 20}
    config = TrainConfig(**{**values, **changes})
    return [learning_rate(config, n) for n in range(101)]


NAMES = keys_of(TrainConfig)["lr_scheduler"].metadata["schema"]["enum"]
# Name in transformers, the options there, and our keys. It steps from the first finished step to the last one.
IN_TRANSFORMERS: list[tuple[str, dict, dict]] = [
    ("cosine", {}, {"lr_scheduler": "cosine", "min_lr_ratio": 0}),
    ("linear", {}, {"lr_scheduler": "linear", "min_lr_ratio": 0}),
    ("constant_with_warmup", {}, {"lr_scheduler": "constant"}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.25}, {"lr_scheduler": "cosine", "min_lr_ratio": 0.25}),
    ("cosine_with_min_lr", {"min_lr": 0.5}, {"lr_scheduler": "cosine", "min_lr_ratio": 0.25}),
    (
        "cosine_with_restarts",
        {"num_cycles": 3},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3, "min_lr_ratio": 0},
    ),
    ("cosine_with_restarts", {}, {"lr_scheduler": "cosine_with_restarts", "min_lr_ratio": 0}),
    ("polynomial", {"power": 2.5}, {"lr_scheduler": "polynomial", "lr_power": 2.5, "min_lr_ratio": 1e-7 / 2}),
    ("polynomial", {}, {"lr_scheduler": "polynomial", "min_lr_ratio": 1e-7 / 2}),
    (
        "warmup_stable_decay",
        {"decay_type": "linear", "num_decay_steps": 13},
        {"lr_scheduler": "warmupstabledrop", "drop_iters": 13, "min_lr_ratio": 0},
    ),
]


@pytest.mark.parametrize("name", NAMES)
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


def test_polynomial_and_cosine_with_restarts() -> None:
    got = rates(lr_scheduler="polynomial", lr_power=2, min_lr_ratio=0.2)
    assert got[10:] == pytest.approx([2.0 * (0.2 + 0.8 * (1 - (n - 10) / 90) ** 2) for n in range(10, 101)])
    got = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2, min_lr_ratio=0.2)
    half = [2.0 * (0.2 + 0.4 * (1 + math.cos(math.pi * n / 45))) for n in range(45)]
    assert got[10:] == pytest.approx([*half, *half, 0.4])


@pytest.mark.parametrize(("name", "options", "keys"), IN_TRANSFORMERS)
@pytest.mark.parametrize(("steps", "ratio"), [(30, 0.1), (100, 0.07), (57, 0.03), (40, 0.0)])
def test_schedules_equal_those_of_transformers(name: str, options: dict, keys: dict, steps: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    warmup = TrainingArguments(warmup_steps=ratio).get_warmup_steps(steps)
    scheduler = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    config = TrainConfig(lr=2.0, train_iters=steps, warmup_iters=0, warmup_ratio=ratio, **keys)
    for n in range(steps + 1):
        assert learning_rate(config, n) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-12), n
        optimizer.step()
        scheduler.step()


def test_noam_with_warmup_is_inverse_sqrt_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = get_scheduler("inverse_sqrt", optimizer, 10)
    for rate in rates(lr_scheduler="noam"):
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_keys_of_other_schedules_and_two_warmups_are_refused() -> None:
    for keys, message in (
        ({"lr_power": 2.0}, "lr_power is given, and lr_scheduler is cosine: it is a key of polynomial"),
        ({"lr_num_cycles": 2}, "lr_num_cycles is given"),
        ({"warmup_ratio": 0.1}, "warmup_iters 10 and warmup_ratio 0.1 are both given"),
    ):
        with pytest.raises(UserError, match=message):
            rates(**keys)


def test_shares_of_the_run_and_no_warmup() -> None:
    assert rates(warmup_iters=0.1, drop_iters=0.2, lr_scheduler="warmupstabledrop") == rates(
        lr_scheduler="warmupstabledrop"
    )
    assert rates(warmup_iters=0)[0] == 2.0
