"""Commands of fm9g as forks of one server that has imported everything: a command costs what it does, and no start.

Each has a session of its own, stdout and stderr in files, and can be killed, stopped or waited for.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from helpers.spawn import context, start_server

TIMEOUT_S = 180.0  # seconds that a command may take


@dataclass(frozen=True)
class EndedCommand:
    """What a command left. returncode: its exit code; below 0: the signal that ended it. seconds: from the
    call of main to the end.
    timed_out: it had to be killed, having taken longer than it may. orphans: processes of it that lived on."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool = False
    orphans: int = 0


class RunningCommand:
    """A command that runs: fm9g.cli.main(argv) in a process of its own."""

    def __init__(self, argv: Sequence[str], cwd: Path, preexec_fn: Callable[[], object] | None = None) -> None:
        """preexec_fn: is called in the process before the command."""
        start_server()
        self._out, self._err = _file(), _file()
        names = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (self._out, self._err)]
        begins, tells = context.Pipe(duplex=False)
        self._process = context.Process(target=_command, args=(list(argv), str(cwd), preexec_fn, tells, *names))
        self._process.start()
        self.pid: int = self._process.pid or 0
        tells.close()
        with begins:
            begins.poll(TIMEOUT_S)
        self.began = time.monotonic()

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_after(self, seconds: float) -> None:
        """SIGKILL so many seconds after the start, unless it has ended."""
        self._process.join(max(0.0, self.began + seconds - time.monotonic()))
        self.signal(signal.SIGKILL)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = TIMEOUT_S) -> EndedCommand:
        """Returns when the command has ended; it is killed after `timeout` seconds."""
        self._process.join(timeout)
        timed_out = self._process.is_alive()
        seconds = time.monotonic() - self.began
        self._process.kill()
        self._process.join()
        orphans = end_session(self.pid)
        return EndedCommand(
            self._process.exitcode or 0, _text(self._out), _text(self._err), seconds, timed_out, orphans
        )


def run(
    argv: Sequence[str],
    cwd: Path,
    timeout: float = TIMEOUT_S,
    kill_after: float | None = None,
    preexec_fn: Callable[[], object] | None = None,
) -> EndedCommand:
    """Runs `fm9g argv` in a folder. kill_after: seconds from its start after which SIGKILL ends it."""
    running = RunningCommand(argv, cwd, preexec_fn)
    if kill_after is not None:
        running.kill_after(kill_after)
    return running.wait(timeout)


def end_session(leader: int, patience: float = 20.0) -> int:
    """Gives the processes of a session time to end by themselves; kills those that do not, and counts them."""
    deadline = time.monotonic() + patience
    while (living := session_pids(leader)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in living:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(living)


def session_pids(leader: int) -> list[int]:
    """The processes of a session, without those that have ended."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            state, _, _, number = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:4]
            if int(number) == leader and state != "Z":
                found.append(int(name))
    return found


def pause_process(pid: int, seconds: float) -> None:
    """Stops a process for a while, if it still runs."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(pid, signal.SIGCONT)


def _command(
    argv: list[str], cwd: str, preexec_fn: Callable[[], object] | None, tells: Connection, out: str, err: str
) -> None:
    os.setsid()
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(cwd)
    if preexec_fn:
        preexec_fn()
    from fm9g.cli import main

    tells.close()
    sys.exit(main(argv))


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode("utf-8", "replace")
