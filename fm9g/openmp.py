"""How threads of OpenMP, which torch uses, wait for each other."""

from __future__ import annotations

import os

_SPIN_COUNT = "10000"  # rounds; the default of GNU OpenMP is 300,000


def limit_spin_wait() -> None:
    """Makes waiting OpenMP threads release their core soon, unless the user has configured how they wait.

    On a busy machine a spinning thread takes the core that the awaited thread needs (measurements:
    benchmarks/engine/report.md). Call it before torch is imported; child processes inherit the setting.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
