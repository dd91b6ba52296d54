"""The agent, one per node: starts the workers of its machine, supervises them, and prints why they ended."""

from __future__ import annotations

import contextlib
import logging
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
    RunFailedError,
    failure_key,
    record_failure,
)
from fm9g.launch.heartbeat import HeartbeatTracker, Timing
from fm9g.launch.kv_store import ConnectionLostError, KVClient, KVServer, connect, warn_without_secret
from fm9g.launch.rendezvous import POLL_INTERVAL, Rendezvous
from fm9g.launch.worker_group import WorkerGroup

logger = logging.getLogger(__name__)


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
    """Runs `command` with `argv` in launch_config.nproc workers on this machine, together with the other agents.

    Args:
        timeout: seconds for all nodes to appear, and within which all processes end after a failure.
        step_timeout: seconds that a step may take (see Watchdog).
        max_restarts: how often all workers restart after a failure that is not a user's mistake.
        fingerprint: what all nodes must share, as nested dictionaries; compared before any worker starts.
        log_dir: for the output of all ranks except 0.
        command: empty for fm9g itself.

    Returns 0, 2 for a user's mistake, 130 if interrupted, else 1, after it printed one message to stderr. Raises
    UserError if the agents cannot connect.
    """
    node_fingerprint = {"max_restarts": max_restarts, **(fingerprint or {})}
    agent = _Agent(
        [*(command or fm9g_command()), *argv], launch_config, Timing(timeout), step_timeout, max_restarts, log_dir
    )
    with _SignalCounter() as signals:
        return agent.run(signals, node_fingerprint)


class _SignalCounter:
    """Counts SIGINT, SIGTERM and SIGHUP within its block, and SIGUSR1, which requests a checkpoint."""

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
        self._command, self._step_timeout, self._max_restarts = command, step_timeout, max_restarts
        self._log_dir, self._host = log_dir, host_name()
        self.launch_config, self.timing, self.node_rank = launch_config, timing, launch_config.node_rank
        self.is_master = self.node_rank == 0
        self.connected_nodes = set(range(1, launch_config.nnodes))  # those that may still read the KV store

    def run(self, signals: _SignalCounter, node_fingerprint: Mapping[str, Any]) -> int:
        self.signals = signals
        config, kv_server = self.launch_config, None
        if self.is_master:
            # Workers connect to MASTER_ADDR, too, so a single node needs no network.
            kv_server = KVServer(config.master_port, config.secret, loopback_only=config.nnodes == 1)
        self._port = kv_server.port if kv_server else config.master_port
        try:
            if kv_server:
                warn_without_secret(config.nnodes, self._port, config.secret)
            failure = self._run(node_fingerprint)
        finally:
            if kv_server:
                kv_server.close()
        if failure is not None and failure.cause:
            print(failure.text, file=sys.stderr, flush=True)
        return failure.code if failure else 0

    def _run(self, node_fingerprint: Mapping[str, Any]) -> Failure | None:
        try:
            self.kv_client = self._connect()
            try:
                failure = self._join_and_train(node_fingerprint)
            except RunFailedError as end:
                failure = end.failure
            self._sign_off()
        except RunFailedError as end:  # a signal while connecting
            return end.failure
        except ConnectionLostError as error:
            return self.failure(str(error))
        return failure

    def _connect(self) -> KVClient:
        config, timing = self.launch_config, self.timing
        try:
            return connect(
                config.master_addr,
                self._port,
                config.secret,
                timing.timeout,
                timing.heartbeat_timeout,
                self._stop_if_requested,
            )
        except UserError as error:
            raise UserError(self.failure(str(error)).message) from None

    def _stop_if_requested(self) -> None:
        if name := self.signals.name():
            raise RunFailedError(self.failure(f"interrupted by {name}", EXIT_INTERRUPTED))

    def _join_and_train(self, node_fingerprint: Mapping[str, Any]) -> Failure | None:
        """Raises RunFailedError if the nodes do not get together; ConnectionLostError."""
        rendezvous = Rendezvous(
            self.kv_client, self.launch_config, self._host, self.timing, node_fingerprint, self.signals.name
        )
        self._start_time, self.hosts = rendezvous.join()
        if self._log_dir and not self.is_master:
            first_rank = self.node_rank * self.launch_config.nproc
            logger.info(
                f"node {self.node_rank} of {self.launch_config.nnodes} has joined. Node 0 ({self.hosts[0]}) shows the "
                f"log; the output of this node is in {self._log_dir}/rank-{first_rank}.log and so on"
            )
        return self._run_attempts()

    def _run_attempts(self) -> Failure | None:
        for attempt in range(self._max_restarts + 1):
            envs = [self._worker_env(attempt, local_rank) for local_rank in range(self.launch_config.nproc)]
            with contextlib.closing(WorkerGroup(self._command, envs, self._log_dir)) as worker_group:
                failure, all_ended = _Attempt(self, attempt, worker_group).watch()
            last = attempt == self._max_restarts or not all_ended or self.signals.count
            if failure is None or failure.code != EXIT_FAILURE or last:
                break
            print(failure.text, file=sys.stderr, flush=True)
            logger.warning(f"starting again ({attempt + 1} of {self._max_restarts})")
        return failure

    def _sign_off(self) -> None:
        """Signs off with the master, which keeps the KV store up until all other nodes have signed off."""
        self.kv_client.transact(set={f"signed_off/{self.node_rank}": True})
        keys = [f"signed_off/{node}" for node in self.connected_nodes] if self.is_master else []
        deadline = time.monotonic() + self.timing.ack_timeout
        while time.monotonic() < deadline and not all(self.kv_client.transact(keys).values()):
            time.sleep(POLL_INTERVAL / 2)

    def failure(self, cause: str, code: int = EXIT_FAILURE) -> Failure:
        """A failure of this node."""
        return Failure(cause, None, self._host, self.node_rank, code)

    def _worker_env(self, attempt: int, local_rank: int) -> dict[str, str]:
        config, cores = self.launch_config, len(os.sched_getaffinity(0))
        warnings = [os.environ.get("PYTHONWARNINGS", ""), "ignore::UserWarning:multiprocessing.resource_tracker"]
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // config.nproc)),
            # A killed worker leaves semaphores of its data loader. Python removes them, and would warn about it.
            "PYTHONWARNINGS": ",".join(filter(None, warnings)),
            "RANK": str(self.node_rank * config.nproc + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(config.nproc * config.nnodes),
            "LOCAL_WORLD_SIZE": str(config.nproc),
            "GROUP_RANK": str(self.node_rank),
            "GROUP_WORLD_SIZE": str(config.nnodes),
            "MASTER_ADDR": config.master_addr,
            "MASTER_PORT": str(self._port),  # of the KV store; for torch's store see Watchdog.create_torch_store()
            SECRET_VARIABLE: config.secret,
            "FM9G_AGENT": str(os.getpid()),
            "FM9G_ATTEMPT": str(attempt),
            "FM9G_STARTED": repr(self._start_time),
            "FM9G_TIMEOUT": repr(self.timing.timeout),
            "FM9G_STEP_TIMEOUT": repr(self._step_timeout),
        }


class _Attempt:
    """One attempt: from the start of the workers until those of all nodes have ended."""

    def __init__(self, agent: _Agent, number: int, worker_group: WorkerGroup) -> None:
        self._agent, self._number, self._worker_group = agent, number, worker_group
        self._kv_client, self._timing, self._signals = agent.kv_client, agent.timing, agent.signals
        self._failure: Failure | None = None
        self._failed_at = 0.0  # monotonic
        self._forwarded = self._heartbeats = 0
        self._saves = self._signals.saves
        self._heartbeat_tracker = HeartbeatTracker(time.monotonic())

    def watch(self) -> tuple[Failure | None, bool]:
        """Returns why the workers ended, None if they completed, and whether those of all nodes have ended.

        Raises ConnectionLostError.
        """
        ended, next_heartbeat = False, 0.0
        while True:
            codes = self._worker_group.poll()
            if self._failure is None and (failure := self._first_failure(codes)):
                self._record_failure(failure)
            self._forward_signals()
            if self._failure and time.monotonic() > self._failed_at + self._timing.grace_period:
                self._worker_group.kill()
                codes = self._worker_group.poll()
            if not ended and None not in codes:
                ended, next_heartbeat = True, 0.0
            if time.monotonic() >= next_heartbeat:
                next_heartbeat = time.monotonic() + self._timing.heartbeat_interval
                if self._heartbeat(ended):
                    if self._failure is None and EXIT_INTERRUPTED in codes:  # they saved, and printed that
                        self._failure = self._agent.failure("", EXIT_INTERRUPTED)
                    return self._failure, True
            if self._failure and time.monotonic() > self._failed_at + self._timing.settle_time:
                return self._failure, False
            time.sleep(POLL_INTERVAL)

    def _record_failure(self, failure: Failure) -> None:
        self._end_with(record_failure(self._kv_client, self._number, failure))

    def _end_with(self, failure: Failure) -> None:
        self._failure, self._failed_at = failure, time.monotonic()

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
                self._record_failure(self._agent.failure("killed after a second signal", EXIT_INTERRUPTED))
            self._worker_group.kill()

    def _heartbeat(self, ended: bool) -> bool:
        """Writes the status of this node and reads news. Returns whether the workers of all nodes have ended."""
        agent, failure, done = self._agent, failure_key(self._number), f"{self._number}/done"
        self._heartbeats += 1
        status_keys = [f"{self._number}/agent/{node}" for node in range(agent.launch_config.nnodes)]
        entries = self._kv_client.transact(
            get=[failure, done, *(status_keys if agent.is_master else ())],
            set={status_keys[agent.node_rank]: {"heartbeat": self._heartbeats, "ended": ended}},
        )
        if entries[failure] and self._failure is None:
            self._end_with(Failure.from_json(entries[failure]))
        if not agent.is_master:
            return bool(entries[done])
        return self._check_nodes([entries[key] for key in status_keys])

    def _check_nodes(self, statuses: list[Any]) -> bool:
        """On node 0: tells all nodes when every node has ended; records a failure if an agent is silent."""
        agent, timing = self._agent, self._timing
        silences = self._heartbeat_tracker.update(statuses, time.monotonic())
        agent.connected_nodes = {
            node for node, silence in enumerate(silences) if node and silence < 5 * timing.heartbeat_interval
        }
        if all(status and status["ended"] for status in statuses):
            self._kv_client.transact(set={f"{self._number}/done": True})
            return True
        # Rank 0 misses the ranks of a dead node earlier, and its message names a rank.
        limit = timing.heartbeat_timeout + 2 * timing.heartbeat_interval
        silent = next((node for node, silence in enumerate(silences) if silence > limit), None)
        if silent is not None and self._failure is None:
            cause = f"no heartbeat for {silences[silent]:.0f} s; was the machine or its agent stopped?"
            self._record_failure(Failure(cause, None, agent.hosts[silent], silent))
        return False

    def _first_failure(self, codes: list[int | None]) -> Failure | None:
        """The failure of the first worker here that did not complete. Its watchdog may have recorded more already."""
        for local_rank, code in enumerate(codes):
            rank = self._agent.node_rank * self._agent.launch_config.nproc + local_rank
            if code == EXIT_INTERRUPTED:
                key = f"{self._number}/rank/{rank}"
                status = self._kv_client.transact([key])[key]
                if not status or not status["finished"]:  # so the ranks have not agreed to stop
                    return replace(self._agent.failure("interrupted", EXIT_INTERRUPTED), rank=rank)
            elif code:
                return replace(self._exit_report(local_rank, code), rank=rank)
        return None

    def _exit_report(self, local_rank: int, code: int) -> Failure:
        failure, tail = self._agent.failure, self._worker_group.tail(local_rank)
        shows_output = self._agent.is_master and not local_rank
        last_line = f": {tail[-1]}" if tail else ", see above" if shows_output else ""
        if self._signals.count and -code in (signal.SIGINT, signal.SIGTERM):
            return failure(f"interrupted by {self._signals.name()}", EXIT_INTERRUPTED)
        if code == EXIT_CONNECTION_LOST:
            return failure(f"lost the connection to the master {self._kv_client.address}")
        if code < 0:
            hint = "; was the machine out of memory? (see dmesg)" if -code == signal.SIGKILL else last_line
            return replace(failure(f"killed by {_signal_name(-code)}{hint}"), detail="\n".join(tail))
        report = failure(
            f"ended with exit code {code}{last_line}", EXIT_USER_ERROR if code == EXIT_USER_ERROR else EXIT_FAILURE
        )
        return replace(report, detail="\n".join(tail[:-1]))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
