"""Learning rate schedules, as functions of the number of finished optimizer steps.

n: finished steps, b: the key lr, w: warmup steps, E: train_iters, d: drop steps, r: min_lr_ratio, p: progress after
warmup, (n - w) / max(1, E - w). Each schedule is a linear warmup, b * n / w, followed by b times one of the functions
below.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fm9g.config.train import TrainConfig


def learning_rate(config: TrainConfig, n: int) -> float:
    """The learning rate of the step after n finished ones."""
    end, floor = config.train_iters, config.min_lr_ratio
    # transformers rounds the product in the same way
    warmup = math.ceil(end * config.warmup_ratio) if config.warmup_ratio else _steps(config.warmup_iters, end)
    drop = _steps(config.drop_iters, end)
    if n < warmup:
        return config.lr * n / warmup
    factors: dict[str, Callable[[], float]] = {
        "cosine": lambda: cosine(n, warmup, end, floor),
        "cosine_with_restarts": lambda: cosine_with_restarts(n, warmup, end, floor, config.lr_num_cycles),
        "linear": lambda: linear(n, warmup, end, floor),
        "polynomial": lambda: polynomial(n, warmup, end, floor, config.lr_power),
        "constant": lambda: 1.0,
        "noam": lambda: noam(n, warmup),
        "warmupstabledrop": lambda: stable_drop(n, drop, end, floor),
        "warmupstableexp": lambda: stable_exp(n, drop, config.drop_begin, config.drop_rate),
    }
    return config.lr * factors[config.lr_scheduler]()


def cosine(n: int, warmup: float, end: int, floor: float) -> float:
    """From 1 to r: r + (1 - r) / 2 * (1 + cos(pi * p))."""
    return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * _progress(n, warmup, end)))


def cosine_with_restarts(n: int, warmup: float, end: int, floor: float, cycles: int) -> float:
    """`cycles` times from 1 to r, as cosine: p is replaced by (cycles * p) mod 1 until E (Loshchilov, Hutter 2017)."""
    progress = _progress(n, warmup, end)
    return floor if progress == 1 else floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (cycles * progress % 1)))


def linear(n: int, warmup: float, end: int, floor: float) -> float:
    """From 1 to r on a straight line: r + (1 - r) * (1 - p)."""
    return polynomial(n, warmup, end, floor, 1.0)


def polynomial(n: int, warmup: float, end: int, floor: float, power: float) -> float:
    """From 1 to r: r + (1 - r) * (1 - p)^power."""
    return floor + (1 - floor) * math.pow(1 - _progress(n, warmup, end), power)


def noam(n: int, warmup: float) -> float:
    """sqrt(w / n) (Vaswani et al. 2017, scaled to start at 1); without warmup, w is 1."""
    return math.sqrt(max(warmup, 1) / max(n, 1))


def stable_drop(n: int, drop: float, end: int, floor: float) -> float:
    """1 until E - d, then r + max((1 - r) * (E - n) / d, 0)."""
    return 1.0 if n <= end - drop else floor + max((1 - floor) * (end - n) / drop, 0)


def stable_exp(n: int, drop: float, begin: int, rate: float) -> float:
    """1, then rate^((n - begin) / d) once n > begin >= 0."""
    return rate ** ((n - begin) / max(drop, 1)) if n > begin >= 0 else 1.0


def _progress(n: int, warmup: float, end: int) -> float:
    return min(1.0, (n - warmup) / max(1, end - warmup))


def _steps(value: float, end: int) -> float:
    """A number of steps; values in (0, 1) are shares of the run."""
    return value * end if 0 < value < 1 else value
