"""Facts about GPUs from the makers' data sheets: memory and peak speed. Light: torch is not needed."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A model of GPU.

    Args:
        memory: GiB.
        flops: peak floating-point operations per second in dense bf16 (fp16 on GPUs without bf16).
        context: GiB that a process needs in addition to its tensors; for CUDA and NCCL, a cautious assumption.
    """

    memory: float
    flops: float
    context: float = 2.0


GPUS = {
    "V100": Gpu(32, 125e12),
    "A100": Gpu(80, 312e12),
    "A100-40": Gpu(40, 312e12),
    "A800": Gpu(80, 312e12),
    "L40S": Gpu(48, 362e12),
    "4090": Gpu(24, 165e12),
    "H20": Gpu(96, 148e12),
    "H100": Gpu(80, 989e12),
    "H800": Gpu(80, 989e12),
    "H200": Gpu(140, 989e12),
    "B200": Gpu(179, 2250e12),
    "910B": Gpu(64, 376e12),
}


def data_sheet_flops(name: str) -> float | None:
    """Peak FLOPs per second in bf16 of a GPU, by the name that its driver reports; None: the table lacks it."""
    words = re.split(r"[\s-]+", name)
    return next((gpu.flops for known, gpu in GPUS.items() if known in words), None)
