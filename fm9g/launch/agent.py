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
from fm9g.launch.board import Hub, LostError, reach, warn_without_secret
from fm9g.launch.failure import INTERRUPTED, LOST, OTHER, USER, EndError, Failure, Silence, Timing
from fm9g.launch.meeting import POLL, Meeting
from fm9g.launch.place import SECRET, STEP_TIMEOUT, TIMEOUT, Nodes, host_name, new_secret
from fm9g.launch.team import Team
from fm9g.safe_path import fm9g_command


def run_agent(
    argv: Sequence[str],
    nodes: Nodes,
    *,
    timeout: float = TIMEOUT,
    step_timeout: float = STEP_TIMEOUT,
    max_restarts: int = 0,
    identity: Mapping[str, Any] | None = None,
    log_dir: Path | None = None,
    command: Sequence[str] = (),
) -> int:
    """Runs `command` with `argv` in nodes.nproc processes of this machine, together with the agents of the others.

    command: empty for fm9g itself.
    timeout: seconds for all nodes to appear, and within which all end when one cannot go on. step_timeout: seconds
    that a step may take (see Monitor). max_restarts: how often all processes are started again after a failure that
    is no user's mistake. identity: what must be the same on all nodes, nested dictionaries; compared before anything
    starts. log_dir: for the output of all ranks but 0.

    Returns 0, 2 for a user's mistake, 130 when interrupted, else 1, having printed one message to stderr. Raises
    UserError where the agents cannot even meet.
    """
    same = {"max_restarts": max_restarts, **(identity or {})}
    agent = _Agent([*(command or fm9g_command()), *argv], nodes, Timing(timeout), step_timeout, max_restarts, log_dir)
    with _Signals() as signals:
        return agent.run(signals, same)


class _Signals:
    """Counts SIGINT, SIGTERM and SIGHUP while its block runs, and SIGUSR1, which asks for a checkpoint."""

    def __init__(self) -> None:
        self.count, self.last, self.saves = 0, signal.SIGTERM, 0

    def __enter__(self) -> _Signals:
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
        nodes: Nodes,
        timing: Timing,
        step_timeout: float,
        max_restarts: int,
        log_dir: Path | None,
    ) -> None:
        if nodes.nnodes == 1 and not nodes.secret:
            nodes = replace(nodes, secret=new_secret())
        self._command, self._nodes, self._timing, self._log_dir = command, nodes, timing, log_dir
        self._step_timeout, self._max_restarts = step_timeout, max_restarts
        self._host, self._me, self._master = host_name(), nodes.node_rank, nodes.node_rank == 0
        self._present = set(range(1, nodes.nnodes))  # the nodes that may still want to read the board

    def run(self, signals: _Signals, same: Mapping[str, Any]) -> int:
        self._signals = signals
        # Workers connect to MASTER_ADDR too, so a single node's hub can do without the network.
        nodes = self._nodes
        hub = Hub(nodes.master_port, nodes.secret, local=nodes.nnodes == 1) if self._master else None
        try:
            if hub:
                warn_without_secret(nodes.nnodes, hub.port, nodes.secret)
            failure = self._run(hub.port if hub else nodes.master_port, same)
        finally:
            if hub:
                hub.close()
        if failure is not None and failure.cause:
            print(failure.text, file=sys.stderr, flush=True)
        return failure.code if failure else 0

    def _run(self, port: int, same: Mapping[str, Any]) -> Failure | None:
        nodes, timing = self._nodes, self._timing
        self._port = port
        try:
            self._board = reach(
                nodes.master_addr, port, nodes.secret, timing.timeout, timing.silence, self._end_if_told
            )
        except UserError as error:
            raise UserError(self._failure(str(error)).message) from None
        except EndError as end:
            return end.failure
        failure: Failure | None
        try:
            try:
                meeting = Meeting(self._board, nodes, self._host, timing, same, self._signals.name)
                self._started, self._hosts = meeting.hold()
                self._say_where_the_log_is()
                failure = self._attempts()
            except EndError as end:
                failure = end.failure
            self._part()
        except LostError as error:
            failure = self._failure(str(error))
        return failure

    def _say_where_the_log_is(self) -> None:
        if self._log_dir and not self._master:
            first = self._me * self._nodes.nproc
            print(
                f"machine {self._me} of {self._nodes.nnodes} has joined; the log is shown on machine 0, "
                f"{self._hosts[0]}. What is printed here is in {self._log_dir}/rank-{first}.log and so on",
                flush=True,
            )

    def _end_if_told(self) -> None:
        if name := self._signals.name():
            raise EndError(self._failure(f"interrupted by {name}", INTERRUPTED))

    def _attempts(self) -> Failure | None:
        for attempt in range(self._max_restarts + 1):
            environments = [self._environment(attempt, local) for local in range(self._nodes.nproc)]
            with contextlib.closing(Team(self._command, environments, self._log_dir)) as team:
                failure, together = _Attempt(self, attempt, team).watch()
            last = attempt == self._max_restarts or not together or self._signals.count
            if failure is None or failure.code != OTHER or last:
                break
            again = f"fm9g: starting again ({attempt + 1} of {self._max_restarts})"
            print(f"{failure.text}\n{again}", file=sys.stderr, flush=True)
        return failure

    def _part(self) -> None:
        """The last word with the master; the master keeps the board until the others have said theirs."""
        self._board.exchange(put={f"bye/{self._me}": True})
        keys = [f"bye/{node}" for node in self._present] if self._master else []
        deadline = time.monotonic() + self._timing.grace + 2 * self._timing.beat
        while time.monotonic() < deadline and not all(self._board.exchange(keys).values()):
            time.sleep(POLL / 2)

    def _failure(self, cause: str, code: int = OTHER) -> Failure:
        return Failure(cause, None, self._host, self._me, code)

    def _environment(self, attempt: int, local_rank: int) -> dict[str, str]:
        nodes, cores = self._nodes, len(os.sched_getaffinity(0))
        warnings = [os.environ.get("PYTHONWARNINGS", ""), "ignore::UserWarning:multiprocessing.resource_tracker"]
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // nodes.nproc)),
            # A worker that is ended leaves semaphores of its data loader, which Python clears away, and says so.
            "PYTHONWARNINGS": ",".join(filter(None, warnings)),
            "RANK": str(self._me * nodes.nproc + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(nodes.nproc * nodes.nnodes),
            "LOCAL_WORLD_SIZE": str(nodes.nproc),
            "GROUP_RANK": str(self._me),
            "GROUP_WORLD_SIZE": str(nodes.nnodes),
            "MASTER_ADDR": nodes.master_addr,
            "MASTER_PORT": str(self._port),  # of the board; torch's store is Monitor.store()
            SECRET: nodes.secret,
            "FM9G_AGENT": str(os.getpid()),
            "FM9G_ATTEMPT": str(attempt),
            "FM9G_STARTED": repr(self._started),
            "FM9G_TIMEOUT": repr(self._timing.timeout),
            "FM9G_STEP_TIMEOUT": repr(self._step_timeout),
        }


class _Attempt:
    """One life of the workers, from their start until those of all nodes have ended."""

    def __init__(self, agent: _Agent, number: int, team: Team) -> None:
        self._agent, self._prefix, self._team = agent, str(number), team
        self._board, self._timing, self._signals = agent._board, agent._timing, agent._signals
        self._failure: Failure | None = None
        self._failed_at = 0.0  # monotonic
        self._passed_on = self._beats = 0
        self._saves = self._signals.saves
        self._silence = Silence(time.monotonic())

    def watch(self) -> tuple[Failure | None, bool]:
        """Returns why they ended, None for well, and whether all nodes have ended theirs. Raises LostError."""
        ended, next_beat = False, 0.0
        while True:
            codes = self._team.poll()
            if self._failure is None and (found := self._first_bad(codes)):
                self._fail(found)
            self._pass_on_signals()
            if self._failure and time.monotonic() > self._failed_at + self._timing.grace:
                self._team.kill()
                codes = self._team.poll()
            if not ended and None not in codes:
                ended, next_beat = True, 0.0
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._timing.beat
                if self._beat(ended):
                    if self._failure is None and INTERRUPTED in codes:  # they saved, and said so themselves
                        self._failure = self._agent._failure("", INTERRUPTED)
                    return self._failure, True
            if self._failure and time.monotonic() > self._failed_at + self._timing.settle:
                return self._failure, False
            time.sleep(POLL)

    def _fail(self, failure: Failure) -> None:
        """Records a failure, unless another was first: then that one is it."""
        claimed = self._board.claim(f"{self._prefix}/failure", failure.to_json())
        self._failure, self._failed_at = Failure.from_json(claimed), time.monotonic()

    def _pass_on_signals(self) -> None:
        if self._signals.saves != self._saves:
            self._saves = self._signals.saves
            self._team.signal(signal.SIGUSR1)
        if self._signals.count == self._passed_on:
            return
        self._passed_on += 1
        if self._passed_on == 1:
            self._team.signal(signal.SIGINT if self._signals.last == signal.SIGINT else signal.SIGTERM)
        else:
            if self._failure is None:
                self._fail(self._agent._failure("ended at once by a second signal", INTERRUPTED))
            self._team.kill()

    def _beat(self, ended: bool) -> bool:
        """A sign of life, for the news of the board. Returns whether the processes of all nodes have ended."""
        prefix, agent = self._prefix, self._agent
        self._beats += 1
        others = [f"{prefix}/agent/{node}" for node in range(agent._nodes.nnodes)] if agent._master else []
        notes = self._board.exchange(
            ask=[f"{prefix}/failure", f"{prefix}/over", *others],
            put={f"{prefix}/agent/{agent._me}": {"beat": self._beats, "ended": ended}},
        )
        if notes[f"{prefix}/failure"] and self._failure is None:
            self._failure, self._failed_at = Failure.from_json(notes[f"{prefix}/failure"]), time.monotonic()
        return self._judge([notes[key] for key in others]) if agent._master else bool(notes[f"{prefix}/over"])

    def _judge(self, signs: list[Any]) -> bool:
        """On node 0: tells all when every node has ended; fails where an agent has fallen silent."""
        agent = self._agent
        quiet = self._silence.listen(dict(enumerate(signs)), time.monotonic())
        agent._present = {node for node in quiet if node and quiet[node] < 5 * self._timing.beat}
        if all(sign and sign["ended"] for sign in signs):
            self._board.exchange(put={f"{self._prefix}/over": True})
            return True
        # The ranks of a node that vanished are missed first, and a message that names a rank says more.
        gone = {node for node in quiet if quiet[node] > self._timing.silence + 2 * self._timing.beat}
        if gone and self._failure is None:
            node = min(gone)
            cause = f"no sign of life for {quiet[node]:.0f} s; was the machine or its agent stopped?"
            self._fail(Failure(cause, None, agent._hosts[node], node))
        return False

    def _first_bad(self, codes: list[int | None]) -> Failure | None:
        """What is known here of the first worker that did not end well. Its monitor may have told more already."""
        for local, code in enumerate(codes):
            rank = self._agent._me * self._agent._nodes.nproc + local
            if code == INTERRUPTED:
                key = f"{self._prefix}/rank/{rank}"
                sign = self._board.exchange([key])[key]
                if not sign or not sign["bye"]:  # so the ranks have not agreed to stop
                    return replace(self._agent._failure("interrupted", INTERRUPTED), rank=rank)
            elif code:
                return replace(self._death(local, code), rank=rank)
        return None

    def _death(self, local: int, code: int) -> Failure:
        failure, tail = self._agent._failure, self._team.tail(local)
        said = f": {tail[-1]}" if tail else ", see above" if self._agent._master and not local else ""
        if self._signals.count and -code in (signal.SIGINT, signal.SIGTERM):
            return failure(f"interrupted by {self._signals.name()}", INTERRUPTED)
        if code == LOST:
            return failure(f"lost touch with the master {self._board.where}")
        if code < 0:
            hint = "; was the memory used up? (dmesg)" if -code == signal.SIGKILL else said
            return replace(failure(f"killed by {_signal_name(-code)}{hint}"), detail="\n".join(tail))
        found = failure(f"ended with exit code {code}{said}", USER if code == USER else OTHER)
        return replace(found, detail="\n".join(tail[:-1]))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
