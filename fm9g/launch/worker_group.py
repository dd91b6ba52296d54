"""The worker processes of one machine: started, told a signal, ended; none outlives its agent."""

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
    """Runs one command in several processes, each in a session of its own, so that Ctrl-C reaches the agent alone."""

    def __init__(self, command: Sequence[str], envs: Sequence[Mapping[str, str]], log_dir: Path | None) -> None:
        """envs: one a process. The first shows its output if it is rank 0. What the others print goes to
        log_dir/rank-<rank>.log; without log_dir only their errors are kept, for `tail`."""
        self._outputs: list[IO[bytes] | None] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()  # what was printed before stands before what rank 0 prints
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
        """For each process its exit code, negative for a signal; None while it runs."""
        return [process.poll() for process in self._processes]

    def signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # does nothing where the process has ended

    def kill(self) -> None:
        """Ends at once what still runs, with its own children."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a system call of a dead file server holds it
                process.wait(5)

    def tail(self, local_rank: int) -> list[str]:
        """The last lines that a process wrote; none for rank 0, whose output was shown."""
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
    """In a worker: ends this process when the agent that started it is killed. Does nothing where there is no agent."""
    agent = os.environ.get("FM9G_AGENT")
    if not agent:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(agent):  # it ended before that was set
        os._exit(1)
