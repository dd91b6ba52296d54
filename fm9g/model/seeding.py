"""Random numbers of initial weights: a function of the weight's name and the run's seed, on every engine."""

from __future__ import annotations

import zlib

import torch


def weight_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """The generator of a weight's initial values, whatever other weights the model has."""
    return torch.Generator(device).manual_seed((seed << 32) + zlib.crc32(name.encode()))
