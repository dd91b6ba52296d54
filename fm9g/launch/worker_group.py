"""Starts, signals and ends the worker processes of one machine; none outlives its agent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

TAIL_LINES = 50  # lines of a worker's output that a message may show


class WorkerGroup:
    """Runs one command in several processes, each in its own session, so that Ctrl-C reaches only the agent."""

    def __init__(self, command: Sequence[str], envs: Sequence[Mapping[str, str]], log_dir: Path | None) -> None:
        """Starts the processes. Rank 0 prints to the console, the others to log_dir/rank-<rank>.log.

        Args:
            envs: per process, environment variables to add.
            log_dir: None keeps only what the other ranks write to stderr, for `tail`.
        """
        self._outputs: list[IO[bytes] | None] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()  # so that earlier output stands above that of rank 0
        for env in envs:
            output = self._open_output(env["RANK"], log_dir)
            self._outputs.append(output)
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=None if output is None else output if log_dir else subprocess.DEVNULL,
                    stderr=output,
                    start_new_session=True,
                )
            )

    @staticmethod
    def _open_output(rank: str, log_dir: Path | None) -> IO[bytes] | None:
        if rank == "0":
            return None
        return open(log_dir / f"rank-{rank}.log", "ab+") if log_dir else tempfile.TemporaryFile()

    def poll(self) -> list[int | None]:
        """Returns per process its exit code, negative for a signal; None while it runs."""
        return [process.poll() for process in self._processes]

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # does nothing if the process has ended

    def kill(self) -> None:
        """Kills the processes that still run, with their children."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # a system call on a dead file server cannot be interrupted
                process.wait(5)

    def tail(self, local_rank: int) -> list[str]:
        """Returns the last lines of a process; none for rank 0, which printed to the console."""
        output = self._outputs[local_rank]
        if output is None:
            return []
        output.seek(max(0, output.seek(0, os.SEEK_END) - 100 * TAIL_LINES))
        return output.read().decode(errors="backslashreplace").splitlines()[-TAIL_LINES:]

    def close(self) -> None:
        self.kill()
        for output in self._outputs:
            if output is not None:
                output.close()


def set_parent_death_signal() -> None:
    """Makes the kernel kill this worker when its agent dies. Does nothing without an agent."""
    agent = os.environ.get("FM9G_AGENT")
    if not agent:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(agent):  # it died before prctl took effect
        os._exit(1)
