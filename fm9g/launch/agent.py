"""The agent: one a machine. Starts the processes of a run there, and tells why they ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from fm9g.errors import UserError
from fm9g.io.safe_path import fm9g_command
from fm9g.launch.dist_env import (
    DEFAULT_STEP_TIMEOUT,
    DEFAULT_TIMEOUT,
    SECRET_VARIABLE,
    LaunchConfig,
    generate_secret,
    host_name,
)
from fm9g.launch.failure import (
    EXIT_CONNECTION_LOST,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Failure,
    HeartbeatTracker,
    RunFailedError,
    Timing,
)
from fm9g.launch.kv_store import ConnectionLostError, KVServer, connect, warn_without_secret
from fm9g.launch.rendezvous import POLL_INTERVAL, Rendezvous
from fm9g.launch.worker_group import WorkerGroup


def run_agent(
    argv: Sequence[str],
    launch_config: LaunchConfig,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    step_timeout: float = DEFAULT_STEP_TIMEOUT,
    max_restarts: int = 0,
    fingerprint: Mapping[str, Any] | None = None,
    log_dir: Path | None = None,
    command: Sequence[str] = (),
) -> int:
    """Runs `command` with `argv` in launch_config.nproc processes of this machine, together with the other agents.

    command: empty for fm9g itself.
    timeout: seconds for all nodes to appear, and within which all end when one cannot go on. step_timeout: seconds
    that a step may take (see Watchdog). max_restarts: how often all processes are started again after a failure that
    is no user's mistake. fingerprint: what must be the same on all nodes, nested dictionaries; compared before anything
    starts. log_dir: for the output of all ranks but 0.

    Returns 0, 2 for a user's mistake, 130 when interrupted, else 1, having printed one message to stderr. Raises
    UserError where the agents cannot even meet.
    """
    node_fingerprint = {"max_restarts": max_restarts, **(fingerprint or {})}
    agent = _Agent(
        [*(command or fm9g_command()), *argv], launch_config, Timing(timeout), step_timeout, max_restarts, log_dir
    )
    with _SignalCounter() as signals:
        return agent.run(signals, node_fingerprint)


class _SignalCounter:
    """Counts SIGINT, SIGTERM and SIGHUP while its block runs, and SIGUSR1, which asks for a checkpoint."""

    def __init__(self) -> None:
        self.count, self.last, self.saves = 0, signal.SIGTERM, 0

    def __enter__(self) -> _SignalCounter:
        self._before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN  # nohup
        }
        self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._count_save)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = signal.Signals(number)

    def _count_save(self, number: int, frame: FrameType | None) -> None:
        self.saves += 1

    def name(self) -> str | None:
        return self.last.name if self.count else None

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Agent:
    def __init__(
        self,
        command: list[str],
        launch_config: LaunchConfig,
        timing: Timing,
        step_timeout: float,
        max_restarts: int,
        log_dir: Path | None,
    ) -> None:
        if launch_config.nnodes == 1 and not launch_config.secret:
            launch_config = replace(launch_config, secret=generate_secret())
        self._command, self._launch_config, self._timing, self._log_dir = command, launch_config, timing, log_dir
        self._step_timeout, self._max_restarts = step_timeout, max_restarts
        self._host, self._node_rank = host_name(), launch_config.node_rank
        self._is_master = self._node_rank == 0
        self._connected_nodes = set(range(1, launch_config.nnodes))  # that that may still want to read the KV store

    def run(self, signals: _SignalCounter, node_fingerprint: Mapping[str, Any]) -> int:
        self._signals = signals
        # Workers connect to MASTER_ADDR too, so a single node's server can do without the network.
        launch_config = self._launch_config
        kv_server = (
            KVServer(launch_config.master_port, launch_config.secret, loopback_only=launch_config.nnodes == 1)
            if self._is_master
            else None
        )
        try:
            if kv_server:
                warn_without_secret(launch_config.nnodes, kv_server.port, launch_config.secret)
            failure = self._run(kv_server.port if kv_server else launch_config.master_port, node_fingerprint)
        finally:
            if kv_server:
                kv_server.close()
        if failure is not None and failure.cause:
            print(failure.text, file=sys.stderr, flush=True)
        return failure.code if failure else 0

    def _run(self, port: int, node_fingerprint: Mapping[str, Any]) -> Failure | None:
        launch_config, timing = self._launch_config, self._timing
        self._port = port
        try:
            self._kv_client = connect(
                launch_config.master_addr,
                port,
                launch_config.secret,
                timing.timeout,
                timing.heartbeat_timeout,
                self._stop_if_requested,
            )
        except UserError as error:
            raise UserError(self._failure(str(error)).message) from None
        except RunFailedError as end:
            return end.failure
        failure: Failure | None
        try:
            try:
                rendezvous = Rendezvous(
                    self._kv_client, launch_config, self._host, timing, node_fingerprint, self._signals.name
                )
                self._start_time, self._hosts = rendezvous.join()
                self._print_log_location()
                failure = self._run_attempts()
            except RunFailedError as end:
                failure = end.failure
            self._leave_rendezvous()
        except ConnectionLostError as error:
            failure = self._failure(str(error))
        return failure

    def _print_log_location(self) -> None:
        if self._log_dir and not self._is_master:
            first_rank = self._node_rank * self._launch_config.nproc
            print(
                f"machine {self._node_rank} of {self._launch_config.nnodes} has joined; the log is shown on machine 0, "
                f"{self._hosts[0]}. What is printed here is in {self._log_dir}/rank-{first_rank}.log and so on",
                flush=True,
            )

    def _stop_if_requested(self) -> None:
        if name := self._signals.name():
            raise RunFailedError(self._failure(f"interrupted by {name}", EXIT_INTERRUPTED))

    def _run_attempts(self) -> Failure | None:
        for attempt in range(self._max_restarts + 1):
            envs = [self._worker_env(attempt, local) for local in range(self._launch_config.nproc)]
            with contextlib.closing(WorkerGroup(self._command, envs, self._log_dir)) as worker_group:
                failure, all_ended = _Attempt(self, attempt, worker_group).watch()
            last = attempt == self._max_restarts or not all_ended or self._signals.count
            if failure is None or failure.code != EXIT_FAILURE or last:
                break
            again = f"fm9g: starting again ({attempt + 1} of {self._max_restarts})"
            print(f"{failure.text}\n{again}", file=sys.stderr, flush=True)
        return failure

    def _leave_rendezvous(self) -> None:
        """The last word with the master; the master keeps the KV store until the others have said theirs."""
        self._kv_client.transact(set={f"signed_off/{self._node_rank}": True})
        keys = [f"signed_off/{node}" for node in self._connected_nodes] if self._is_master else []
        deadline = time.monotonic() + self._timing.grace_period + 2 * self._timing.heartbeat_interval
        while time.monotonic() < deadline and not all(self._kv_client.transact(keys).values()):
            time.sleep(POLL_INTERVAL / 2)

    def _failure(self, cause: str, code: int = EXIT_FAILURE) -> Failure:
        return Failure(cause, None, self._host, self._node_rank, code)

    def _worker_env(self, attempt: int, local_rank: int) -> dict[str, str]:
        launch_config, cores = self._launch_config, len(os.sched_getaffinity(0))
        warnings = [os.environ.get("PYTHONWARNINGS", ""), "ignore::UserWarning:multiprocessing.resource_tracker"]
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // launch_config.nproc)),
            # A worker that is ended leaves semaphores of its data loader, which Python clears away, and says so.
            "PYTHONWARNINGS": ",".join(filter(None, warnings)),
            "RANK": str(self._node_rank * launch_config.nproc + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(launch_config.nproc * launch_config.nnodes),
            "LOCAL_WORLD_SIZE": str(launch_config.nproc),
            "GROUP_RANK": str(self._node_rank),
            "GROUP_WORLD_SIZE": str(launch_config.nnodes),
            "MASTER_ADDR": launch_config.master_addr,
            "MASTER_PORT": str(self._port),  # of the KV store; torch's store is Watchdog.create_torch_store()
            SECRET_VARIABLE: launch_config.secret,
            "FM9G_AGENT": str(os.getpid()),
            "FM9G_ATTEMPT": str(attempt),
            "FM9G_STARTED": repr(self._start_time),
            "FM9G_TIMEOUT": repr(self._timing.timeout),
            "FM9G_STEP_TIMEOUT": repr(self._step_timeout),
        }


class _Attempt:
    """One life of the workers, from their start until those of all nodes have ended."""

    def __init__(self, agent: _Agent, number: int, worker_group: WorkerGroup) -> None:
        self._agent, self._prefix, self._worker_group = agent, str(number), worker_group
        self._kv_client, self._timing, self._signals = agent._kv_client, agent._timing, agent._signals
        self._failure: Failure | None = None
        self._failed_at = 0.0  # monotonic
        self._forwarded = self._heartbeats = 0
        self._saves = self._signals.saves
        self._heartbeat_tracker = HeartbeatTracker(time.monotonic())

    def watch(self) -> tuple[Failure | None, bool]:
        """Returns why they ended, None for well, and whether all nodes have ended theirs.

        Raises ConnectionLostError.
        """
        ended, next_heartbeat = False, 0.0
        while True:
            codes = self._worker_group.poll()
            if self._failure is None and (found := self._first_failure(codes)):
                self._record_failure(found)
            self._forward_signals()
            if self._failure and time.monotonic() > self._failed_at + self._timing.grace_period:
                self._worker_group.kill()
                codes = self._worker_group.poll()
            if not ended and None not in codes:
                ended, next_heartbeat = True, 0.0
            if time.monotonic() >= next_heartbeat:
                next_heartbeat = time.monotonic() + self._timing.heartbeat_interval
                if self._heartbeat(ended):
                    if self._failure is None and EXIT_INTERRUPTED in codes:  # they saved, and said so themselves
                        self._failure = self._agent._failure("", EXIT_INTERRUPTED)
                    return self._failure, True
            if self._failure and time.monotonic() > self._failed_at + self._timing.settle_time:
                return self._failure, False
            time.sleep(POLL_INTERVAL)

    def _record_failure(self, failure: Failure) -> None:
        """Records a failure, unless another was first: then that one is it."""
        recorded = self._kv_client.set_if_absent(f"{self._prefix}/failure", failure.to_json())
        self._failure, self._failed_at = Failure.from_json(recorded), time.monotonic()

    def _forward_signals(self) -> None:
        if self._signals.saves != self._saves:
            self._saves = self._signals.saves
            self._worker_group.signal(signal.SIGUSR1)
        if self._signals.count == self._forwarded:
            return
        self._forwarded += 1
        if self._forwarded == 1:
            self._worker_group.signal(signal.SIGINT if self._signals.last == signal.SIGINT else signal.SIGTERM)
        else:
            if self._failure is None:
                self._record_failure(self._agent._failure("ended at once by a second signal", EXIT_INTERRUPTED))
            self._worker_group.kill()

    def _heartbeat(self, ended: bool) -> bool:
        """A sign of life, for the news of the KV store. Returns whether the processes of all nodes have ended."""
        prefix, agent = self._prefix, self._agent
        self._heartbeats += 1
        others = [f"{prefix}/agent/{node}" for node in range(agent._launch_config.nnodes)] if agent._is_master else []
        entries = self._kv_client.transact(
            get=[f"{prefix}/failure", f"{prefix}/done", *others],
            set={f"{prefix}/agent/{agent._node_rank}": {"heartbeat": self._heartbeats, "ended": ended}},
        )
        if entries[f"{prefix}/failure"] and self._failure is None:
            self._failure, self._failed_at = Failure.from_json(entries[f"{prefix}/failure"]), time.monotonic()
        return (
            self._check_peers([entries[key] for key in others]) if agent._is_master else bool(entries[f"{prefix}/done"])
        )

    def _check_peers(self, statuses: list[Any]) -> bool:
        """On node 0: tells all when every node has ended; fails where an agent has fallen silent."""
        agent = self._agent
        silent_for = self._heartbeat_tracker.update(dict(enumerate(statuses)), time.monotonic())
        agent._connected_nodes = {
            node for node in silent_for if node and silent_for[node] < 5 * self._timing.heartbeat_interval
        }
        if all(status and status["ended"] for status in statuses):
            self._kv_client.transact(set={f"{self._prefix}/done": True})
            return True
        # The ranks of a node that vanished are missed first, and a message that names a rank says more.
        unreachable = {
            node
            for node in silent_for
            if silent_for[node] > self._timing.heartbeat_timeout + 2 * self._timing.heartbeat_interval
        }
        if unreachable and self._failure is None:
            node = min(unreachable)
            cause = f"no sign of life for {silent_for[node]:.0f} s; was the machine or its agent stopped?"
            self._record_failure(Failure(cause, None, agent._hosts[node], node))
        return False

    def _first_failure(self, codes: list[int | None]) -> Failure | None:
        """What is known here of the first worker that did not end well. Its watchdog may have told more already."""
        for local, code in enumerate(codes):
            rank = self._agent._node_rank * self._agent._launch_config.nproc + local
            if code == EXIT_INTERRUPTED:
                key = f"{self._prefix}/rank/{rank}"
                status = self._kv_client.transact([key])[key]
                if not status or not status["finished"]:  # so the ranks have not agreed to stop
                    return replace(self._agent._failure("interrupted", EXIT_INTERRUPTED), rank=rank)
            elif code:
                return replace(self._exit_report(local, code), rank=rank)
        return None

    def _exit_report(self, local: int, code: int) -> Failure:
        failure, tail = self._agent._failure, self._worker_group.tail(local)
        last_words = f": {tail[-1]}" if tail else ", see above" if self._agent._is_master and not local else ""
        if self._signals.count and -code in (signal.SIGINT, signal.SIGTERM):
            return failure(f"interrupted by {self._signals.name()}", EXIT_INTERRUPTED)
        if code == EXIT_CONNECTION_LOST:
            return failure(f"lost touch with the master {self._kv_client.address}")
        if code < 0:
            hint = "; was the memory used up? (dmesg)" if -code == signal.SIGKILL else last_words
            return replace(failure(f"killed by {_signal_name(-code)}{hint}"), detail="\n".join(tail))
        found = failure(
            f"ended with exit code {code}{last_words}", EXIT_USER_ERROR if code == EXIT_USER_ERROR else EXIT_FAILURE
        )
        return replace(found, detail="\n".join(tail[:-1]))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
