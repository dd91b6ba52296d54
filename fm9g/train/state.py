"""The state of a run that its loop, its callbacks and its checkpoints share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class TrainControl:
    """Requests to the loop. A callback sets a field, on any rank; the loop makes the ranks agree at the next step.

    should_stop: end after this step. should_save: write a checkpoint after this step; the loop resets it on saving.
    """

    should_stop: bool = False
    should_save: bool = False


@dataclass
class TrainState:
    """How far a run is.

    Args:
        step: finished optimizer steps.
        task_tokens: (num_tasks,) tokens trained on; on rank 0 those before a resume are included.
        skipped_steps: steps that left the weights as they were.
        loss: of the last logged step; None if it was not finite.
        val_loss: of the evaluation at exactly this step.
        best_val_loss: lowest of all evaluations.
        evals_since_best: evaluations since that one.
    """

    step: int
    task_tokens: np.ndarray
    skipped_steps: int = 0
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    evals_since_best: int = 0
    control: TrainControl = field(default_factory=TrainControl)
