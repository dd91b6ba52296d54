"""Tests that need an NVIDIA GPU; without one they skip, and say so. `make test-gpu` runs them alone."""

import importlib.util
import os

import pytest


@pytest.fixture(scope="session")
def gpus() -> int:
    """How many there are; what needs one asks for it."""
    if os.environ.get("FM9G_GPU_REHEARSAL"):
        return 2
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU at hand: torch.cuda.is_available() is False")
    return torch.cuda.device_count()


@pytest.fixture(scope="session")
def two_gpus(gpus: int) -> None:
    if gpus < 2:
        pytest.skip("one NVIDIA GPU at hand, and this needs two")


@pytest.fixture
def bmtrain() -> None:
    if importlib.util.find_spec("bmtrain") is None:
        pytest.skip("bmtrain is not installed: `make bmtrain` does it")


@pytest.fixture
def flash_attn(gpus: int) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
