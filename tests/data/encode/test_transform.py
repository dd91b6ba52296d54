"""The user's Python files: their limits of time, and files that cannot be read."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stopped_clock import StandStill

from fm9g.data.encode import transform
from fm9g.data.encode.transform import load_transform
from fm9g.errors import UserError


@pytest.mark.parametrize(("seconds", "ended"), [(10, False), (30, True)])
def test_a_program_that_was_stopped_has_its_time_to_transform_afterwards(
    monkeypatch: pytest.MonkeyPatch, seconds: int, ended: bool
) -> None:
    clock = StandStill(1000)
    monkeypatch.setattr(transform, "time", clock)

    def block() -> None:
        with transform.guard_user_code("t", 20.0):
            for _ in range(seconds):
                clock.sleep(1.0)
                signal.raise_signal(signal.SIGALRM)

    if ended:
        with pytest.raises(UserError, match="t: takes more than 20 seconds"):
            block()
    else:
        block()


def test_a_transform_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.py").write_text("def transform(data, num_sample, r): return data")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(UserError, match="a: transforms: this user has no permission to read it"):
        load_transform(tmp_path / "t.py", "a: transforms", 1.0)


def test_a_transform_leaves_no_bytecode_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "t.py").write_text("def transform(data, num_sample, r): return data")
    load_transform(tmp_path / "t.py", "a: transforms", 1.0)
    assert [file.name for file in tmp_path.iterdir()] == ["t.py"]


def test_a_program_has_its_own_alarm_before_and_after_a_transform() -> None:
    code = (
        "import signal\n"
        "from fm9g.data.encode.transform import guard_user_code\n"
        "signal.signal(signal.SIGALRM, lambda *_: print('alarm'))\n"
        "signal.setitimer(signal.ITIMER_REAL, 60.0)\n"
        "with guard_user_code('t', 20.0): pass\n"
        "assert signal.getitimer(signal.ITIMER_REAL)[0] > 30.0\n"
        "signal.raise_signal(signal.SIGALRM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alarm\n"), done.stderr
