"""Tokens and targets of packs, by task."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fm9g.data.load.packing import IGNORE_INDEX, Pack


def count_tokens_by_task(packs: Iterable[Pack], num_tasks: int) -> np.ndarray:
    """(num_tasks,) tokens of the packs, without padding."""
    counts = np.zeros(num_tasks, np.int64)
    for pack in packs:
        counts += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=num_tasks)
    return counts


def count_targets_by_task(packs: Iterable[Pack], num_tasks: int) -> np.ndarray:
    """(num_tasks,) targets of the packs, each counted by its weight."""
    counts = np.zeros(num_tasks)
    for pack in packs:
        rows = pack.targets != IGNORE_INDEX
        weights = None if pack.target_weights is None else pack.target_weights[rows]
        counts += np.bincount(pack.task_ids[rows], weights, minlength=num_tasks)
    return counts
