"""Threads that wait give up their core soon, unless the user has said how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fm9g.openmp import limit_spin_wait

PLAIN = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_what_the_user_set_stays(given: dict, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    limit_spin_wait()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_every_command_sets_it_before_torch_is_there() -> None:
    code = (
        "import os, sys, fm9g.openmp as threads; plain = threads.limit_spin_wait\n"
        "def told():\n  plain(); print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])\n"
        "threads.limit_spin_wait = told\n"
        "from fm9g.cli import main\nmain(['config', 'keys'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=PLAIN, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "False 10000", done.stderr
