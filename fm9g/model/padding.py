"""Rounds sizes that vary from step to step up to few, where each new size costs time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pad_rows(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Appends rows of zeros to a tensor (N, ...) until N is a multiple, in half precision on a CPU.

    There oneDNN compiles a kernel for each size, in about 10 ms, and caches 1,024 of them, of about 1 MB each.
    Elsewhere the tensor is returned as it is.
    """
    padding = -len(rows) % multiple
    if not padding or rows.device.type != "cpu" or rows.dtype not in (torch.bfloat16, torch.float16):
        return rows
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, padding))
