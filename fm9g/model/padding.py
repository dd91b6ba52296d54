"""Sizes that vary from step to step, rounded up to few where each new size costs time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_rows(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """(N, ...) with rows of zeros at the end, up to a multiple, where matrix products are compiled for their size.

    That is half precision on a CPU: oneDNN compiles a kernel for each size, in about 10 ms, and keeps 1,024 of them, of
    about 1 MB each. Elsewhere, and where N is a multiple, the rows as they are.
    """
    padding = -len(rows) % multiple
    if not padding or rows.device.type != "cpu" or rows.dtype not in (torch.bfloat16, torch.float16):
        return rows
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, padding))
