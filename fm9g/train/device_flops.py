"""Name and peak speed of a device."""

from __future__ import annotations

import torch

from fm9g.hardware import data_sheet_flops


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak floating-point operations per second of a device, from the maker's data sheet; None: unknown.

    The table has GPUs in bf16 and fp16. A measured peak would vary with the load of the machine, and the MFU with it.

    Args:
        dtype: precision of the computation: bf16, fp16 or fp32.
    """
    if device.type != "cuda" or dtype == "fp32":
        return None
    return data_sheet_flops(torch.cuda.get_device_name(device))


def device_name(device: torch.device) -> str:
    """The name of a GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
