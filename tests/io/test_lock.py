"""Locks on folders."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fm9g.io.lock import exclusive_lock, wait_lock


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom fm9g.io.lock import exclusive_lock\n"
        "with exclusive_lock(pathlib.Path(sys.argv[1]), 0, 'busy'): print('held')"
    )
    with exclusive_lock(tmp_path / "run", 0, "busy"):
        other = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True)
        assert f"{tmp_path / 'run'}: busy" in other.stderr
    other = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True)
    assert other.stdout == "held\n"


def test_without_locks_there_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_lock(tmp_path / "run", 0, "busy"):
        assert "this file system has no locks: nothing stops a second process here" in caplog.text


def test_a_lock_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fm9g")
    taken: list[str] = []

    def take() -> None:
        with wait_lock(tmp_path / "locks" / "a", "waiting for the other"):
            taken.append("second")

    with wait_lock(tmp_path / "locks" / "a", ""):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.1)
        taken.append("first")
    thread.join(10)
    assert taken == ["first", "second"]
    assert caplog.messages == ["waiting for the other"]
