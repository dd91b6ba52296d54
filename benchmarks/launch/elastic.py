"""Compares launchers: torch.distributed.elastic (torchrun) and fm9g's own agents.

    python benchmarks/launch/elastic.py

Two nodes with one sleeping worker each, both on this machine. For each launcher it measures the time to start, how long
the other node keeps running after an agent or a worker is killed, and what an outsider can do that reaches the port.
Writes elastic.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path(__file__).with_suffix(".md")
ABOUT = """\
# Launchers: torch.distributed.elastic (torchrun) and fm9g's own agents

`python benchmarks/launch/elastic.py --limit {limit:.0f}`. Two nodes of one process each, whose workers sleep, so
that no collective operation fails and tells the other node. "Runs on": the node had not ended by then.
fm9g's timeout is 60 s.
"""
WORKER = """
import os, sys, time
if "FM9G_AGENT" in os.environ:  # as fm9g's own workers do; torchrun has nothing like it
    from fm9g.launch.watchdog import Watchdog
    from fm9g.launch.dist_env import read_dist_env
    Watchdog(read_dist_env())
folder, seconds = sys.argv[1], float(sys.argv[2])
open(os.path.join(folder, os.environ["RANK"]), "w").write(str(os.getpid()))
time.sleep(seconds)
"""
AGENT = """
import json, sys
sys.path.insert(0, {root!r})
from fm9g.launch.agent import run_agent
from fm9g.launch.dist_env import LaunchConfig
node, port, worker, folder, seconds = sys.argv[1:]
launch_config = LaunchConfig(1, nnodes=2, node_rank=int(node), master_addr="127.0.0.1", master_port=int(port))
sys.exit(run_agent([worker, folder, seconds], launch_config, timeout=60.0, command=[sys.executable]))
"""
OUTSIDER = """
import datetime, sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False,
                 timeout=datetime.timedelta(seconds=5))
print("keys", store.num_keys())
for key in ("torch.rendezvous.run",):
    print("deleted" if store.delete_key(key) else "no such key", key)
    store.set(key, "forged")
"""


def start(launcher: str, node: int, port: int, worker: Path, folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Starts the agent of a node."""
    if launcher == "torchrun":
        words = [
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=run", "--max-restarts=0"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", str(worker), str(folder), str(seconds)),
        ]
        words.insert(2, f"--rdzv-conf=is_host={str(node == 0).lower()}")
    else:
        words = ["-c", AGENT.format(root=str(ROOT)), str(node), str(port), str(worker), str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FM9G_SECRET": "the secret of the run"}
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


class Pair:
    """Two nodes with running workers."""

    def __init__(self, launcher: str, seconds: float = 600.0) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (worker := folder / "worker.py").write_text(WORKER, encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        began = time.monotonic()
        self.nodes = [start(launcher, node, self.port, worker, folder, seconds) for node in (0, 1)]
        while not all((folder / str(rank)).exists() and (folder / str(rank)).stat().st_size for rank in (0, 1)):
            if time.monotonic() - began > 120 or any(node.poll() is not None for node in self.nodes):
                raise SystemExit("\n".join(self.end(node)[1] for node in self.nodes))
            time.sleep(0.05)
        self.started = time.monotonic() - began
        self.workers = [int((folder / str(rank)).read_text()) for rank in (0, 1)]

    def end(self, node: subprocess.Popen[str]) -> tuple[int, str]:
        """Kills a node that still runs; returns its exit code and output."""
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
        return node.wait(), node.stdout.read() if node.stdout else ""

    def watch(self, limit: float) -> tuple[float | None, list[int], int, list[str]]:
        """Waits until both nodes have ended, `limit` seconds at most.

        Returns the seconds until then (None: longer), exit codes, number of workers without an agent, and outputs.
        """
        began = time.monotonic()
        while time.monotonic() - began < limit and any(node.poll() is None for node in self.nodes):
            time.sleep(0.05)
        seconds = None if any(node.poll() is None for node in self.nodes) else time.monotonic() - began
        codes = [node.poll() for node in self.nodes]
        orphans = [pid for pid, node in zip(self.workers, self.nodes) if node.poll() is not None and lives(pid)]
        for worker in self.workers:
            if lives(worker):
                os.kill(worker, signal.SIGKILL)
        ends = [self.end(node) for node in self.nodes]
        self._folder.cleanup()
        return seconds, codes, len(orphans), [output for _, output in ends]


def lives(pid: int) -> bool:
    """Whether a process still runs."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def outsider(port: int) -> str:
    """What a process outside of the run can do at the port."""
    done = subprocess.run([sys.executable, "-c", OUTSIDER, str(port)], capture_output=True, text=True, timeout=60)
    return done.stdout.replace("\n", "; ") or (done.stderr.splitlines() or ["nothing"])[-1][:80]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds to wait for an end (%(default)s)")
    limit = parser.parse_args().limit
    cases: dict[str, Callable[[Pair], str]] = {
        "agent of node 1 killed": lambda pair: os.kill(pair.nodes[1].pid, signal.SIGKILL) or "",
        "worker of node 1 killed": lambda pair: os.kill(pair.workers[1], signal.SIGKILL) or "",
        "worker of node 1 stopped": lambda pair: os.kill(pair.workers[1], signal.SIGSTOP) or "",
        "an outsider at the port": lambda pair: outsider(pair.port),
    }
    rows = []
    for launcher in ("torchrun", "fm9g"):
        for name, act in cases.items():
            pair = Pair(launcher)
            did = act(pair)
            seconds, codes, orphans, outputs = pair.watch(limit)
            lines = [sum(1 for line in text.splitlines() if line.strip()) for text in outputs]
            shown = f"not within {limit:.0f} s" if seconds is None else f"{seconds:.1f} s"
            ends = ", ".join("runs on" if code is None else str(code) for code in codes)
            rows.append(
                f"| {launcher} | {name} | {pair.started:.1f} s | {shown} | {ends} | {orphans} | {lines} | {did} |"
            )
            print(rows[-1], flush=True)
    head = (
        "| launcher | what happens | start | all ended after | exit codes | workers without an agent | lines of output "
        "| the outsider |"
    )
    REPORT.write_text("\n".join([ABOUT.format(limit=limit), head, "|---" * 8 + "|", *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
