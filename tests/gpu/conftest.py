"""Tests that need an NVIDIA GPU, and skip without one. `make test-gpu` runs them alone.

They end with a table: test, engine, result, seconds. After FM9G_GPU_SECONDS (540) no further test starts, so that the
table appears within ten minutes.
"""

import importlib.util
import os
import time
from typing import Any

import pytest

_START = time.monotonic()
_SECONDS = float(os.environ.get("FM9G_GPU_SECONDS", "540"))
_rows: dict[str, tuple[str, float]] = {}  # test id -> result, seconds of all its phases


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "tests/gpu/" in item.nodeid and time.monotonic() - _START > _SECONDS:
        pytest.skip(f"not started: {_SECONDS:.0f} s are over (FM9G_GPU_SECONDS)")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/gpu/" not in report.nodeid:
        return
    result, seconds = _rows.get(report.nodeid, ("passed", 0.0))
    if report.skipped:
        result = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "skipped"
    elif report.failed:
        result = "FAILED"
    _rows[report.nodeid] = result, seconds + report.duration


def pytest_terminal_summary(terminalreporter: Any) -> None:
    others = [item for kind in ("passed", "failed") for item in terminalreporter.stats.get(kind, [])]
    if not _rows or any("tests/gpu/" not in item.nodeid for item in others):
        return  # these are only a few of the tests that ran
    terminalreporter.section("on this machine's GPUs")
    lines = [("test", "engine", "result", "seconds")]
    for nodeid, (result, seconds) in _rows.items():
        name = nodeid.rpartition("::")[2]
        params = nodeid.partition("[")[2]
        engines = [engine for engine in ("torch", "bmtrain") if engine in params or f"_{engine}_on" in name]
        lines.append((name, " ".join(engines), result, f"{seconds:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    terminalreporter.write_line(f"{time.monotonic() - _START:.0f} s in all")


@pytest.fixture(scope="session")
def gpus() -> int:
    """The number of GPUs; tests that need one request this fixture."""
    if os.environ.get("FM9G_GPU_REHEARSAL"):
        return 2
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU: torch.cuda.is_available() is False")
    return torch.cuda.device_count()


@pytest.fixture(scope="session")
def two_gpus(gpus: int) -> None:
    if gpus < 2:
        pytest.skip("needs two NVIDIA GPUs, and there is one")


@pytest.fixture
def bmtrain() -> None:
    if importlib.util.find_spec("bmtrain") is None:
        pytest.skip("bmtrain is not installed; `make bmtrain` installs it")


@pytest.fixture
def flash_attn(gpus: int) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
