"""From packs, which the loader gives, to batches on the device, which the model takes.

R: targets of a pack, that is positions whose next token counts for the loss.
"""

from __future__ import annotations

import numpy as np
import torch

from fm9g.data.load.packing import IGNORE_INDEX, Pack
from fm9g.model.transformer import Batch


def to_batch(pack: Pack, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """A pack on the device, and (R,) the task of each of its targets."""
    rows = np.flatnonzero(pack.targets != IGNORE_INDEX)
    arrays = (pack.input_ids, pack.positions, pack.cu_seqlens, rows, pack.targets[rows], pack.task_ids[rows])
    ids, positions, cu_seqlens, target_positions, targets, tasks = (to_device(array, device) for array in arrays)
    seqlens = np.diff(pack.cu_seqlens).tolist()
    weights = None if pack.target_weights is None else to_device(pack.target_weights[rows], device)
    return Batch(ids, positions, cu_seqlens, seqlens, target_positions, targets.long(), weights), tasks


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device."""
    tensor = torch.from_numpy(array)
    # Only a copy from pinned memory overlaps with the computation.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def sum_by_task(
    values: torch.Tensor, target_weights: torch.Tensor | None, tasks: torch.Tensor, num_tasks: int
) -> torch.Tensor:
    """(num_tasks,) sums of a value of each target, by the weights of the targets.

    Args:
        values: (R,), such as losses.
        target_weights: (R,), or None if all are 1.
        tasks: (R,) task of each target.
        num_tasks: length of the result.
    """
    task_indices = torch.arange(num_tasks, device=values.device)[:, None]
    weighted = values if target_weights is None else values * target_weights
    # Not index_add_, which adds in no fixed order on a GPU.
    return torch.where(tasks == task_indices, weighted, 0.0).sum(1)
