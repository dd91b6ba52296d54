"""How fast a device can compute at most, which the model FLOPs utilization is a share of."""

from __future__ import annotations

import re
import time

import torch

from fm9g.plan.setup import GPUS

_SECONDS, _SIZE = 0.2, 1024


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one device: by the maker's data sheet where its GPU is known and the type
    is bf16 or fp16, else measured with a matrix product on what this process may use."""
    if device.type == "cuda" and dtype != torch.float32:
        words = re.split(r"[\s-]+", torch.cuda.get_device_name(device))
        known = [name for name in GPUS if name in words]
        if known:
            return GPUS[known[0]].flops
    left = torch.randn(_SIZE, _SIZE, device=device, dtype=dtype)
    right = torch.randn(_SIZE, _SIZE, device=device, dtype=dtype)
    torch.mm(left, right)  # the first one makes ready
    best, began = float("inf"), time.monotonic()
    while time.monotonic() - began < _SECONDS:
        start = time.monotonic()
        product = torch.mm(left, right)
        product[0, 0].item()  # waits for the device
        best = min(best, time.monotonic() - start)
    return 2 * _SIZE**3 / best
