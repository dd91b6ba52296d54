"""The watchdog: a thread in each worker. It sends heartbeats, notices hanging steps and dead ranks, and ends the run.

A step is to this package a number that the worker increases while it makes progress; messages show it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fm9g.launch.dist_env import RankInfo, host_name
from fm9g.launch.failure import (
    EXIT_CONNECTION_LOST,
    Failure,
    classify_exception,
    exit_code,
    failure_key,
    is_probably_secondary,
    record_failure,
)
from fm9g.launch.heartbeat import HeartbeatTracker, Timing
from fm9g.launch.kv_store import LOOPBACK, ConnectionLostError, KVClient, KVServer, connect, warn_without_secret
from fm9g.launch.stack_dump import dump_stacks, find_stragglers
from fm9g.launch.worker_group import set_parent_death_signal

TRAINING = "training"  # the activity that step_timeout limits


@dataclass(frozen=True)
class _Progress:
    step: int
    activity: str
    timeout: float  # seconds; 0: no limit
    since: float  # monotonic

    def overdue(self) -> float:
        """Seconds since the last progress if these exceed the timeout, else 0."""
        idle = time.monotonic() - self.since
        return idle if 0 < self.timeout < idle else 0.0


class Watchdog:
    """Supervises this rank while the training loop runs; a context manager around all work of a worker.

        worker                    watchdog thread               KV store (node 0)
        report_progress(step) --> heartbeat, step      -------> rank/<r>: status
                                  rank 0 reads all statuses <--
        exception             --> record_failure       -------> failure (the first one wins)
                                  failure read -> os._exit <---

    If the block ends without an exception, the ranks sign off, each at its own time. If it ends with one, all processes
    of the run end with one message. A single process needs no network: it is watched for hanging steps only, and its
    exceptions propagate.
    """

    def __init__(self, rank_info: RankInfo, log_dir: Path | None = None) -> None:
        """log_dir: where to save the stacks of a hanging step. Raises UserError if the KV store is out of reach."""
        set_parent_death_signal()
        self.rank_info, self._log_dir, self._timing = rank_info, log_dir, Timing(rank_info.timeout)
        self._host, self._prefix = host_name(), str(rank_info.attempt)
        self._progress = _Progress(0, "starting", 0.0, time.monotonic())
        self._closing, self._closed, self._exit_lock = threading.Event(), threading.Event(), threading.Lock()
        self._heartbeats, self._stacks_requested = 0, False
        self._heartbeat_tracker = HeartbeatTracker(time.monotonic())
        self._kv_server: KVServer | None = None
        self._stores: list[Any] = []  # the stores this process hosts; its peers may use them until it ends
        self._kv_client = None if rank_info.is_single_process else self._connect()
        if self._kv_client is not None:
            self._heartbeat(self._kv_client)  # now, so that a rank that dies a moment later is missed
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _connect(self) -> KVClient:
        """Connects to the KV store, and hosts it first if no agent does and this is rank 0."""
        rank_info, port, secret = self.rank_info, self.rank_info.master_port, self.rank_info.secret
        if rank_info.launcher == "torchrun":
            from fm9g.launch.torch_store import bootstrap_under_torchrun

            port, secret, self._kv_server, store = bootstrap_under_torchrun(rank_info)
            self._stores.append(store)
        elif not rank_info.has_agent and rank_info.rank == 0:
            self._kv_server = KVServer(port, secret, loopback_only=rank_info.nnodes == 1)
            warn_without_secret(rank_info.nnodes, port, secret)
        addr = LOOPBACK if rank_info.nnodes == 1 else rank_info.master_addr
        return connect(addr, port, secret, rank_info.timeout, self._timing.heartbeat_timeout)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
        else:
            self.report_failure(error)

    def report_progress(self, step: int, activity: str = TRAINING, timeout: float | None = None) -> None:
        """Reports progress; resets the clock of the timeout.

        Args:
            step: completed steps.
            activity: what starts now, in words.
            timeout: seconds until the next call; 0: no limit; None: step_timeout for "training", no limit for other
                activities.
        """
        if timeout is None:
            timeout = self.rank_info.step_timeout if activity == TRAINING else 0.0
        self._progress = _Progress(step, activity, timeout, time.monotonic())

    def create_torch_store(self) -> Any:
        """Creates a store for torch.distributed.init_process_group(store=..., rank=..., world_size=...).

        Rank 0 hosts it on a free port, which the others read from the KV store. Raises ConnectionLostError.
        """
        from fm9g.launch.torch_store import create_tcp_store

        assert self._kv_client is not None, "a single process needs no store"
        key = f"{self._prefix}/torch"
        if self.rank_info.rank == 0:
            self._stores.append(store := create_tcp_store(self.rank_info, 0, is_master=True))
            self._kv_client.transact(set={key: store.port})
            return store
        while (port := self._kv_client.transact([key])[key]) is None:
            time.sleep(0.1)  # if rank 0 never comes this far, the watchdog thread ends this process
        return create_tcp_store(self.rank_info, port, is_master=False)

    def report_failure(self, error: BaseException) -> int:
        """Ends all processes of the run because of this error; in a single process only returns its exit code.

        The death of a rank makes the collective operations of its peers fail. So after an error of communication this
        rank first waits as long as the others need to notice a dead rank.
        """
        if self._kv_client is None:
            return exit_code(error)
        if is_probably_secondary(error):
            self.report_progress(self._progress.step, "failing")
            # If a peer is dead, the watchdog thread ends this process during this time.
            time.sleep(self._timing.heartbeat_timeout + 3 * self._timing.heartbeat_interval)
        failure = classify_exception(error, self.rank_info, self._host)
        try:
            self._exit(record_failure(self._kv_client, self.rank_info.attempt, failure))
        except ConnectionLostError as lost:
            self._exit(self._failure(str(lost)), EXIT_CONNECTION_LOST)
        return failure.code

    def close(self) -> None:
        """Signs off. Rank 0, which watches its peers and may host the KV store, waits until all have signed off.

        It waits for `timeout` seconds at most.
        """
        self._closing.set()
        if self._kv_client is not None:
            self._closed.wait(self.rank_info.timeout + self._timing.heartbeat_interval)

    # In the watchdog thread

    def _watch(self) -> None:
        try:
            while not self._closed.is_set():
                self._watch_single_process() if self._kv_client is None else self._heartbeat(self._kv_client)
                if not self._closing.wait(self._timing.heartbeat_interval):
                    continue
                if self._kv_client is None:
                    return
                time.sleep(self._timing.heartbeat_interval / 8)
        except ConnectionLostError as error:
            self._exit(self._failure(str(error)), EXIT_CONNECTION_LOST)
        except Exception as error:  # else the run would continue without a watchdog
            trace = "".join(traceback.format_exception(error))
            self._exit(replace(self._failure(f"its watchdog thread failed: {error!r}"), detail=trace))

    def _heartbeat(self, kv_client: KVClient) -> None:
        """Writes the status of this rank, reads news of the others, and acts on them."""
        rank_info, prefix, finished = self.rank_info, self._prefix, self._closing.is_set()
        self._heartbeats += 1
        failure, dump_request = failure_key(rank_info.attempt), f"{prefix}/dump_stacks"
        statuses_keys = [f"{prefix}/rank/{rank}" for rank in range(rank_info.world_size)] if rank_info.rank == 0 else []
        entries = kv_client.transact(
            get=[failure, dump_request, *statuses_keys],
            set={f"{prefix}/rank/{rank_info.rank}": self._status(finished)},
        )
        if entries[failure]:
            self._exit(Failure.from_json(entries[failure]))
        if entries[dump_request] and not self._stacks_requested:
            self._stacks_requested = True
            kv_client.transact(set={f"{prefix}/stacks/{rank_info.rank}": dump_stacks()})
        if rank_info.rank == 0:
            statuses = [entries[key] for key in statuses_keys]
            finished = finished and all(status and status["finished"] for status in statuses)
            self._check_ranks(kv_client, statuses)
        if finished:
            self._closed.set()

    def _status(self, finished: bool) -> dict[str, Any]:
        progress = self._progress
        return {
            "heartbeat": self._heartbeats,
            "host": self._host,
            "step": progress.step,
            "activity": progress.activity,
            "overdue": 0.0 if finished else progress.overdue(),
            "finished": finished,
        }

    def _check_ranks(self, kv_client: KVClient, statuses: list[Any]) -> None:
        """On rank 0: ends the run if a rank is silent or a step hangs."""
        # An agent sees whether its workers live; without one, a rank has `timeout` seconds to appear.
        start_timeout = float("inf") if self.rank_info.has_agent else self.rank_info.timeout
        silences = self._heartbeat_tracker.update(statuses, time.monotonic())
        for rank, (silence, status) in enumerate(zip(silences, statuses)):
            if status is None and silence > start_timeout:
                self._fail_rank(f"no heartbeat since the start, {silence:.0f} s ago", rank, "", unreachable=True)
            if status and not status["finished"] and silence > self._timing.heartbeat_timeout:
                cause = f"no heartbeat for {silence:.0f} s (step {status['step'] + 1}, {status['activity']})"
                self._fail_rank(cause, rank, status["host"], unreachable=True)
        if any(status and status["overdue"] for status in statuses):
            self._fail_hanging_step(kv_client, statuses)

    def _fail_hanging_step(self, kv_client: KVClient, statuses: list[Any]) -> None:
        """Collects and shows the stacks of all ranks, then names the ranks for which the others wait."""
        stacks = self._collect_stacks(kv_client)
        names = [f"rank {rank} on host {status['host'] if status else '?'}" for rank, status in enumerate(statuses)]
        where = self._write_stacks("".join(f"== {name}\n{stack['text']}" for name, stack in zip(names, stacks)))
        steps = [status["step"] if status else -1 for status in statuses]
        overdue = max(status["overdue"] for status in statuses if status)
        straggler, *others = find_stragglers(steps, [stack["in_collective"] for stack in stacks])
        also = f" (also on ranks {', '.join(map(str, others))})" if others else ""
        status = statuses[straggler]
        self._fail_rank(
            f"step {steps[straggler] + 1} hangs, without progress for {overdue:.0f} s{also}; {where}",
            straggler,
            status["host"] if status else "",
        )

    def _collect_stacks(self, kv_client: KVClient) -> list[dict[str, Any]]:
        """The stacks by rank, as dump_stacks gives them, of the ranks that answer in time."""
        self._stacks_requested = True
        keys = [f"{self._prefix}/stacks/{rank}" for rank in range(self.rank_info.world_size)]
        kv_client.transact(set={f"{self._prefix}/dump_stacks": True, keys[0]: dump_stacks()})
        deadline = time.monotonic() + self._timing.ack_timeout
        while None in (entries := kv_client.transact(keys)).values() and time.monotonic() < deadline:
            time.sleep(0.1)
        return [entries[key] or {"text": "no answer\n", "in_collective": False} for key in keys]

    def _watch_single_process(self) -> None:
        progress = self._progress
        overdue = progress.overdue()
        if overdue and not self._closing.is_set():
            where = self._write_stacks(dump_stacks()["text"])
            self._exit(self._failure(f"step {progress.step + 1} hangs, without progress for {overdue:.0f} s; {where}"))

    def _write_stacks(self, stacks: str) -> str:
        """Writes stacks to stderr and to a file in log_dir; returns where to find them."""
        print(stacks, file=sys.stderr, flush=True)
        if self._log_dir is None:
            return (
                "its stacks are above"
                if self.rank_info.is_single_process
                else "the stacks of all ranks are in the output of rank 0"
            )
        path = self._log_dir / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(stacks, encoding="utf-8")
        except OSError as error:  # a full disk may be why the step hangs
            return f"the stacks are in the output of rank 0 ({path}: {error.strerror})"
        return f"stacks: {path}"

    # Ending

    def _failure(self, cause: str) -> Failure:
        return Failure(cause, self.rank_info.rank, self._host, self.rank_info.node_rank)

    def _fail_rank(self, cause: str, rank: int, host: str, unreachable: bool = False) -> None:
        """Ends the run because of another rank."""
        assert self._kv_client is not None
        failure = Failure(cause, rank, host, rank // self.rank_info.local_world_size, unreachable=unreachable)
        self._exit(record_failure(self._kv_client, self.rank_info.attempt, failure))

    def _exit(self, failure: Failure, code: int | None = None) -> None:
        """Ends this process. An agent prints the message, else the first reachable rank of each node does."""
        with self._exit_lock:  # a second thread waits here for the end
            rank_info = self.rank_info
            if not rank_info.has_agent and rank_info.rank == self._reporting_rank(failure, code):
                print(failure.text, file=sys.stderr)
            # Another thread may hold the lock of a stream for ever, so flushing has a time limit.
            flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
            flush.start()
            flush.join(1)
            if self._kv_client is not None and code != EXIT_CONNECTION_LOST:
                self._ack_failure(self._kv_client)
            os._exit(code if code == EXIT_CONNECTION_LOST and rank_info.has_agent else failure.code)

    def _reporting_rank(self, failure: Failure, code: int | None) -> int:
        """The rank of this node that prints the message where no agent does."""
        rank, first_rank = self.rank_info.rank, self.rank_info.rank - self.rank_info.local_rank
        unreachable = 0 if code == EXIT_CONNECTION_LOST else failure.rank if failure.unreachable else None
        return first_rank + 1 if unreachable == first_rank != rank else first_rank

    def _ack_failure(self, kv_client: KVClient) -> None:
        """Acknowledges the failure.

        Without our agent, torchrun and SLURM kill the remaining local ranks as soon as one exits, so each rank first
        waits until its local peers have acknowledged. Rank 0, if it hosts the KV store, waits for all ranks.
        """
        rank_info, first_rank = self.rank_info, self.rank_info.rank - self.rank_info.local_rank
        local_ranks = range(first_rank, first_rank + rank_info.local_world_size)
        ranks = range(rank_info.world_size) if self._kv_server else local_ranks
        keys = [f"{self._prefix}/failure_ack/{rank}" for rank in ranks]
        deadline = time.monotonic() + self._timing.ack_timeout
        try:
            kv_client.transact(set={f"{self._prefix}/failure_ack/{rank_info.rank}": True})
            while not rank_info.has_agent and time.monotonic() < deadline and None in kv_client.transact(keys).values():
                time.sleep(0.1)
        except ConnectionLostError:
            pass
