"""Learning rate schedules, as functions of the number of finished optimizer steps.

n: finished steps, b: base rate, w: warmup steps, E: train_iters, d: drop steps. Each starts with a linear warmup b*n/w.
"""

from __future__ import annotations

import math

from fm9g.config.train import TrainConfig


def learning_rate(config: TrainConfig, n: int) -> float:
    """The learning rate of the step after n finished ones."""
    end = config.train_iters
    warmup, drop = _steps(config.warmup_iters, end), _steps(config.drop_iters, end)
    if n < warmup:
        return config.lr * n / warmup
    if config.lr_scheduler == "cosine":
        return config.lr * cosine(n, warmup, end)
    if config.lr_scheduler == "warmupstabledrop":
        return config.lr * stable_drop(n, drop, end)
    return config.lr * stable_exp(n, drop, config.drop_begin, config.drop_rate)


def cosine(n: int, warmup: float, end: int) -> float:
    """From 1 to 0.1: 0.1 + 0.45 * (1 + cos(pi * p)), p = (n - w) / max(1, E - w)."""
    progress = min(1.0, (n - warmup) / max(1, end - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def stable_drop(n: int, drop: float, end: int) -> float:
    """1 until E - d, then 0.1 + max(0.9 * (E - n) / d, 0)."""
    return 1.0 if n <= end - drop else 0.1 + max(0.9 * (end - n) / drop, 0)


def stable_exp(n: int, drop: float, begin: int, rate: float) -> float:
    """1, then rate^((n - begin) / d) once n > begin >= 0."""
    return rate ** ((n - begin) / max(drop, 1)) if n > begin >= 0 else 1.0


def _steps(value: float, end: int) -> float:
    """Values in (0, 1) are shares of the run."""
    return value * end if 0 < value < 1 else value
