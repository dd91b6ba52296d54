"""How fast a device can compute at most, which the model FLOPs utilization is a share of; and what it is called."""

from __future__ import annotations

import re

import torch

from fm9g.plan.job import GPUS


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second of one device by the maker's data sheet; None: there is none for it.

    It is known of some GPUs, in bf16 and fp16. A measured peak would change with what else the machine does, and the
    share of it with that.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return None
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device))
    return next((gpu.flops for name, gpu in GPUS.items() if name in words), None)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
