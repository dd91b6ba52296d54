"""How the threads of torch wait for each other."""

from __future__ import annotations

import os

_SPIN_COUNT = "10000"  # rounds; GNU's OpenMP has 300,000


def limit_spin_wait() -> None:
    """Has threads of OpenMP that wait give up their core soon, unless the user has said how they wait.

    Where something else runs on the machine, a thread that spins takes the core that the awaited one would need. The
    figures are in benchmarks/engine/report.md. It acts on processes that have not imported torch yet, and on those
    that this one starts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
