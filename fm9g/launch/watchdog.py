"""The watchdog: one a worker. Signs of life, hanging steps, and the one end that all processes come to."""

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
from fm9g.launch.failure import EXIT_CONNECTION_LOST, Failure, HeartbeatTracker, Timing
from fm9g.launch.failure_analysis import classify_exception, exit_code, is_probably_secondary
from fm9g.launch.kv_store import LOOPBACK, ConnectionLostError, KVClient, KVServer, connect, warn_without_secret
from fm9g.launch.stack_dump import dump_stacks, find_stragglers
from fm9g.launch.worker_group import set_parent_death_signal

TRAINING = "training"  # the activity that must go on within step_timeout


@dataclass(frozen=True)
class _Progress:
    step: int
    activity: str
    timeout: float  # seconds; 0: any time
    since: float  # monotonic


class Watchdog:
    """Lives beside the training loop, in a thread.

    Used as a context manager around all that a worker does. If its block ends well, the ranks say goodbye, each when it
    likes. If it ends with an exception, all processes of the run end with one message; a single process only gets its
    exception. A process that is alone is watched for hanging steps, and needs no network.
    """

    def __init__(self, rank_info: RankInfo, log_dir: Path | None = None) -> None:
        """log_dir: for the stacks of a step that hangs. Raises UserError where the other processes are out of reach."""
        set_parent_death_signal()
        self.rank_info, self._log_dir, self._timing = rank_info, log_dir, Timing(rank_info.timeout)
        self._host, self._prefix = host_name(), str(rank_info.attempt)
        self._progress = _Progress(0, "starting", 0.0, time.monotonic())
        self._closing, self._closed, self._exit_lock = threading.Event(), threading.Event(), threading.Lock()
        self._heartbeats, self._stacks_requested = 0, False
        self._heartbeat_tracker = HeartbeatTracker(time.monotonic())
        self._kv_server: KVServer | None = None
        self._stores: list[Any] = []  # that others may use until this process ends
        self._kv_client: KVClient | None = None
        if not rank_info.is_single_process:
            port, secret = rank_info.master_port, rank_info.secret
            if rank_info.launcher == "torchrun":  # its own store has the port
                from fm9g.launch.torch_store import bootstrap_under_torchrun

                port, secret, self._kv_server, store = bootstrap_under_torchrun(rank_info)
                self._stores.append(store)
            elif not rank_info.has_agent and rank_info.rank == 0:
                self._kv_server = KVServer(port, secret, loopback_only=rank_info.nnodes == 1)
                warn_without_secret(rank_info.nnodes, port, secret)
            addr = LOOPBACK if rank_info.nnodes == 1 else rank_info.master_addr
            self._kv_client = connect(addr, port, secret, rank_info.timeout, self._timing.heartbeat_timeout)
        if self._kv_client is not None:
            self._heartbeat(self._kv_client)  # now, so that whoever dies a moment later is missed
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
        else:
            self.report_failure(error)

    def report_progress(self, step: int, activity: str = TRAINING, timeout: float | None = None) -> None:
        """Says that something was completed. step: steps done. activity: what begins now.

        timeout: seconds until the next call; None: step_timeout for "training", any time for another activity; 0: any.
        """
        if timeout is None:
            timeout = self.rank_info.step_timeout if activity == TRAINING else 0.0
        self._progress = _Progress(step, activity, timeout, time.monotonic())

    def create_torch_store(self) -> Any:
        """A store for torch.distributed.init_process_group(store=..., rank=..., world_size=...), new in each attempt.

        Rank 0 hosts it on a free port, which the others learn from the KV store. Raises ConnectionLostError.
        """
        from fm9g.launch.torch_store import create_tcp_store

        assert self._kv_client is not None, "a single process needs no store"
        key = f"{self._prefix}/torch"
        if self.rank_info.rank == 0:
            self._stores.append(store := create_tcp_store(self.rank_info, 0, is_master=True))
            self._kv_client.transact(set={key: store.port})
            return store
        while (port := self._kv_client.transact([key])[key]) is None:
            time.sleep(0.1)  # if rank 0 never comes this far, the thread below ends this process
        return create_tcp_store(self.rank_info, port, is_master=False)

    def report_failure(self, error: BaseException) -> int:
        """Ends all processes of the run because of this error. In a single process only returns its exit code.

        An error of a collective operation often is only the echo of another rank's death, so such an error gives that
        time to be noticed first.
        """
        if self._kv_client is None:
            return exit_code(error)
        if is_probably_secondary(error):
            self.report_progress(self._progress.step, "failing")
            # The thread ends the process when it is noticed.
            time.sleep(self._timing.heartbeat_timeout + 3 * self._timing.heartbeat_interval)
        failure = classify_exception(error, self.rank_info, self._host)
        try:
            self._exit(self._record_failure(failure))
        except ConnectionLostError as lost:
            self._exit(self._failure(str(lost)), EXIT_CONNECTION_LOST)
        return failure.code

    def close(self) -> None:
        """Says goodbye. Rank 0 stays until all have, at most `timeout` seconds, since it watches them, and may hold the
        KV store."""
        self._closing.set()
        if self._kv_client is not None:
            self._closed.wait(self.rank_info.timeout + self._timing.heartbeat_interval)

    # The thread

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
        except Exception as error:  # else the run would go on, and nobody would watch it
            trace = "".join(traceback.format_exception(error))
            self._exit(replace(self._failure(f"its watching thread failed: {error!r}"), detail=trace))

    def _heartbeat(self, kv_client: KVClient) -> None:
        """One sign of life, for the news of the KV store."""
        rank_info, prefix, finished = self.rank_info, self._prefix, self._closing.is_set()
        self._heartbeats += 1
        ranks = range(rank_info.world_size) if rank_info.rank == 0 else ()
        entries = kv_client.transact(
            get=[f"{prefix}/failure", f"{prefix}/dump_stacks", *(f"{prefix}/rank/{rank}" for rank in ranks)],
            set={f"{prefix}/rank/{rank_info.rank}": self._status(finished)},
        )
        if entries[f"{prefix}/failure"]:
            self._exit(Failure.from_json(entries[f"{prefix}/failure"]))
        if entries[f"{prefix}/dump_stacks"] and not self._stacks_requested:
            self._stacks_requested = True
            kv_client.transact(set={f"{prefix}/stacks/{rank_info.rank}": dump_stacks()})
        if rank_info.rank == 0:
            statuses = [entries[f"{prefix}/rank/{rank}"] for rank in ranks]
            finished = finished and all(status and status["finished"] for status in statuses)
            self._check_peers(kv_client, statuses)
        if finished:
            self._closed.set()

    def _status(self, finished: bool) -> dict[str, Any]:
        now = self._progress
        idle = time.monotonic() - now.since
        return {
            "heartbeat": self._heartbeats,
            "host": self._host,
            "step": now.step,
            "activity": now.activity,
            "overdue": idle if 0 < now.timeout < idle and not finished else 0.0,
            "finished": finished,
        }

    def _check_peers(self, kv_client: KVClient, statuses: list[Any]) -> None:
        """On rank 0: ends the run where a rank has fallen silent or a step hangs."""
        silent_for = self._heartbeat_tracker.update(dict(enumerate(statuses)), time.monotonic())
        for rank, status in enumerate(statuses):
            # An agent knows of its processes whether they live; without one, a rank has `timeout` to appear.
            never = 1e9 if self.rank_info.has_agent else self.rank_info.timeout
            if not (status and status["finished"]) and silent_for[rank] > (
                self._timing.heartbeat_timeout if status else never
            ):
                did = f" (step {status['step'] + 1}, {status['activity']})" if status else " since the start"
                self._fail_rank(
                    f"no sign of life for {silent_for[rank]:.0f} s{did}",
                    rank,
                    status["host"] if status else "",
                    unreachable=True,
                )
        if any(status and status["overdue"] for status in statuses):
            self._fail_hanging_step(kv_client, statuses)

    def _fail_hanging_step(self, kv_client: KVClient, statuses: list[Any]) -> None:
        """Gathers and shows the stacks of all ranks, then names those that the others wait for."""
        prefix, count = self._prefix, self.rank_info.world_size
        self._stacks_requested = True
        keys = [f"{prefix}/stacks/{rank}" for rank in range(count)]
        kv_client.transact(set={f"{prefix}/dump_stacks": True, keys[0]: dump_stacks()})
        deadline = time.monotonic() + self._timing.grace_period + 2 * self._timing.heartbeat_interval
        while None in (entries := kv_client.transact(keys)).values() and time.monotonic() < deadline:
            time.sleep(0.1)
        stacks = [entries[key] or {"text": "no answer\n", "in_collective": False} for key in keys]
        names = [f"rank {r} on host {status['host'] if status else '?'}" for r, status in enumerate(statuses)]
        steps = [status["step"] if status else -1 for status in statuses]
        where = self._write_stacks("".join(f"== {name}\n{stack['text']}" for name, stack in zip(names, stacks)))
        overdue = max(status["overdue"] for status in statuses if status)
        stragglers = find_stragglers(steps, [stack["in_collective"] for stack in stacks])
        also = f", and so do ranks {', '.join(map(str, stragglers[1:]))}" if len(stragglers) > 1 else ""
        status = statuses[stragglers[0]]
        self._fail_rank(
            f"hangs in step {steps[stragglers[0]] + 1} for {overdue:.0f} s{also}; {where}",
            stragglers[0],
            status["host"],
        )

    def _watch_single_process(self) -> None:
        now = self._progress
        idle = time.monotonic() - now.since
        if 0 < now.timeout < idle and not self._closing.is_set():
            where = self._write_stacks(dump_stacks()["text"])
            self._exit(self._failure(f"hangs in step {now.step + 1} for {idle:.0f} s; {where}"))

    def _write_stacks(self, stacks: str) -> str:
        """Writes stacks to stderr, and to a file of log_dir; returns where to find them."""
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
        except OSError as error:  # a disk that hangs or is full may be why the step hangs
            return f"the stacks are in the output of rank 0 ({path}: {error.strerror})"
        return f"stacks: {path}"

    # The end

    def _failure(self, cause: str) -> Failure:
        return Failure(cause, self.rank_info.rank, self._host, self.rank_info.node_rank)

    def _record_failure(self, failure: Failure) -> Failure:
        assert self._kv_client is not None
        return Failure.from_json(self._kv_client.set_if_absent(f"{self._prefix}/failure", failure.to_json()))

    def _fail_rank(self, cause: str, rank: int, host: str, unreachable: bool = False) -> None:
        node = rank // self.rank_info.local_world_size
        self._exit(self._record_failure(Failure(cause, rank, host, node, unreachable=unreachable)))

    def _exit(self, failure: Failure, code: int | None = None) -> None:
        """Ends this process; an agent tells why, else the first rank of each machine that still can."""
        with self._exit_lock:  # whoever comes second waits here for the end
            rank_info = self.rank_info
            unreachable_rank = 0 if code == EXIT_CONNECTION_LOST else failure.rank if failure.unreachable else None
            first_local_rank = rank_info.rank - rank_info.local_rank
            reporter = (
                first_local_rank + 1 if unreachable_rank == first_local_rank != rank_info.rank else first_local_rank
            )
            if not rank_info.has_agent and rank_info.rank == reporter:
                print(failure.text, file=sys.stderr)
            # Another thread may hold a stream for ever, so flushing must not be waited for.
            flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
            flush.start()
            flush.join(1)
            if self._kv_client is not None and code != EXIT_CONNECTION_LOST:
                self._ack_failure(self._kv_client)
            os._exit(code if code == EXIT_CONNECTION_LOST and rank_info.has_agent else failure.code)

    def _ack_failure(self, kv_client: KVClient) -> None:
        """Tells that this rank has the failure. Without an agent each waits for the others of its machine, since
        torchrun and SLURM end those, unheard, as soon as one has ended; and rank 0, which holds the KV store, for
        all."""
        rank_info, first_local_rank = self.rank_info, self.rank_info.rank - self.rank_info.local_rank
        ranks = (
            range(rank_info.world_size)
            if self._kv_server
            else range(first_local_rank, first_local_rank + rank_info.local_world_size)
        )
        keys = [f"{self._prefix}/failure_ack/{rank}" for rank in ranks]
        deadline = time.monotonic() + self._timing.grace_period + 2 * self._timing.heartbeat_interval
        try:
            kv_client.transact(set={f"{self._prefix}/failure_ack/{rank_info.rank}": True})
            while not rank_info.has_agent and time.monotonic() < deadline and None in kv_client.transact(keys).values():
                time.sleep(0.1)
        except ConnectionLostError:
            pass
