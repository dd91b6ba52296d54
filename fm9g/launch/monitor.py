"""The monitor: one a worker. Signs of life, hanging steps, and the one end that all processes come to."""

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

from fm9g.launch.blame import exit_code, failure_of, may_be_echo
from fm9g.launch.board import LOOPBACK, Board, Hub, LostError, reach, warn_without_secret
from fm9g.launch.failure import LOST, Failure, Silence, Timing
from fm9g.launch.place import Place, host_name
from fm9g.launch.stacks import find_laggards, take_stacks
from fm9g.launch.team import die_with_agent

STEP = "training"  # the activity that must go on within step_timeout


@dataclass(frozen=True)
class _Progress:
    step: int
    activity: str
    limit: float  # seconds; 0: any time
    since: float  # monotonic


class Monitor:
    """Lives beside the training loop, in a thread.

    Used as a context manager around all that a worker does. If its block ends well, the ranks say goodbye, each when it
    likes. If it ends with an exception, all processes of the run end with one message; a single process only gets its
    exception. A process that is alone is watched for hanging steps, and needs no network.
    """

    def __init__(self, place: Place, log_dir: Path | None = None) -> None:
        """log_dir: for the stacks of a step that hangs. Raises UserError where the other processes are out of reach."""
        die_with_agent()
        self.place, self._log_dir, self._timing = place, log_dir, Timing(place.timeout)
        self._host, self._prefix = host_name(), str(place.attempt)
        self._progress = _Progress(0, "starting", 0.0, time.monotonic())
        self._closing, self._closed, self._leaving = threading.Event(), threading.Event(), threading.Lock()
        self._beats, self._asked = 0, False
        self._silence = Silence(time.monotonic())
        self._hub: Hub | None = None
        self._stores: list[Any] = []  # that others may use until this process ends
        self._board: Board | None = None
        if not place.alone:
            port, secret = place.master_port, place.secret
            if place.launcher == "torchrun":  # its own store has the port
                from fm9g.launch.torch_store import meet_under_torchrun

                port, secret, self._hub, store = meet_under_torchrun(place)
                self._stores.append(store)
            elif not place.agent and place.rank == 0:
                self._hub = Hub(port, secret, local=place.nodes == 1)
                warn_without_secret(place.nodes, port, secret)
            addr = LOOPBACK if place.nodes == 1 else place.master_addr
            self._board = reach(addr, port, secret, place.timeout, self._timing.silence)
        if self._board is not None:
            self._beat(self._board)  # now, so that whoever dies a moment later is missed
        threading.Thread(target=self._watch, name="monitor", daemon=True).start()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
        else:
            self.report(error)

    def progress(self, step: int, activity: str = STEP, limit: float | None = None) -> None:
        """Says that something was completed. step: steps done. activity: what begins now.

        limit: seconds until the next call; None: step_timeout for "training", any time for another activity; 0: any.
        """
        if limit is None:
            limit = self.place.step_timeout if activity == STEP else 0.0
        self._progress = _Progress(step, activity, limit, time.monotonic())

    def store(self) -> Any:
        """A store for torch.distributed.init_process_group(store=..., rank=..., world_size=...), new in each attempt.

        Rank 0 hosts it on a free port, which the others learn from the board. Raises LostError.
        """
        from fm9g.launch.torch_store import open_store

        assert self._board is not None, "a single process needs no store"
        key = f"{self._prefix}/torch"
        if self.place.rank == 0:
            self._stores.append(store := open_store(self.place, 0, hosted=True))
            self._board.exchange(put={key: store.port})
            return store
        while (port := self._board.exchange([key])[key]) is None:
            time.sleep(0.1)  # if rank 0 never comes this far, the thread below ends this process
        return open_store(self.place, port, hosted=False)

    def report(self, error: BaseException) -> int:
        """Ends all processes of the run because of this error. In a single process only returns its exit code.

        An error of a collective operation often is only the echo of another rank's death, so such an error gives that
        time to be noticed first.
        """
        if self._board is None:
            return exit_code(error)
        if may_be_echo(error):
            self.progress(self._progress.step, "failing")
            time.sleep(self._timing.silence + 3 * self._timing.beat)  # the thread ends the process when it is noticed
        failure = failure_of(error, self.place, self._host)
        try:
            self._leave(self._claim(failure))
        except LostError as lost:
            self._leave(self._failure(str(lost)), LOST)
        return failure.code

    def close(self) -> None:
        """Says goodbye. Rank 0 stays until all have, at most `timeout` seconds, since it watches them, and may hold the
        board."""
        self._closing.set()
        if self._board is not None:
            self._closed.wait(self.place.timeout + self._timing.beat)

    # The thread

    def _watch(self) -> None:
        try:
            while not self._closed.is_set():
                self._watch_alone() if self._board is None else self._beat(self._board)
                if not self._closing.wait(self._timing.beat):
                    continue
                if self._board is None:
                    return
                time.sleep(self._timing.beat / 8)
        except LostError as error:
            self._leave(self._failure(str(error)), LOST)
        except Exception as error:  # else the run would go on, and nobody would watch it
            trace = "".join(traceback.format_exception(error))
            self._leave(replace(self._failure(f"its watching thread failed: {error!r}"), detail=trace))

    def _beat(self, board: Board) -> None:
        """One sign of life, for the news of the board."""
        place, prefix, bye = self.place, self._prefix, self._closing.is_set()
        self._beats += 1
        ranks = range(place.world_size) if place.rank == 0 else ()
        notes = board.exchange(
            ask=[f"{prefix}/failure", f"{prefix}/ask", *(f"{prefix}/rank/{rank}" for rank in ranks)],
            put={f"{prefix}/rank/{place.rank}": self._sign(bye)},
        )
        if notes[f"{prefix}/failure"]:
            self._leave(Failure.from_json(notes[f"{prefix}/failure"]))
        if notes[f"{prefix}/ask"] and not self._asked:
            self._asked = True
            board.exchange(put={f"{prefix}/stacks/{place.rank}": take_stacks()})
        if place.rank == 0:
            signs = [notes[f"{prefix}/rank/{rank}"] for rank in ranks]
            bye = bye and all(sign and sign["bye"] for sign in signs)
            self._judge(board, signs)
        if bye:
            self._closed.set()

    def _sign(self, bye: bool) -> dict[str, Any]:
        now = self._progress
        idle = time.monotonic() - now.since
        return {
            "beat": self._beats,
            "host": self._host,
            "step": now.step,
            "activity": now.activity,
            "late": idle if 0 < now.limit < idle and not bye else 0.0,
            "bye": bye,
        }

    def _judge(self, board: Board, signs: list[Any]) -> None:
        """On rank 0: ends the run where a rank has fallen silent or a step hangs."""
        quiet = self._silence.listen(dict(enumerate(signs)), time.monotonic())
        for rank, sign in enumerate(signs):
            # An agent knows of its processes whether they live; without one, a rank has `timeout` to appear.
            never = 1e9 if self.place.agent else self.place.timeout
            if not (sign and sign["bye"]) and quiet[rank] > (self._timing.silence if sign else never):
                did = f" (step {sign['step'] + 1}, {sign['activity']})" if sign else " since the start"
                self._end(
                    f"no sign of life for {quiet[rank]:.0f} s{did}", rank, sign["host"] if sign else "", gone=True
                )
        if any(sign and sign["late"] for sign in signs):
            self._end_hanging(board, signs)

    def _end_hanging(self, board: Board, signs: list[Any]) -> None:
        """Gathers and shows the stacks of all ranks, then names those that the others wait for."""
        prefix, count = self._prefix, self.place.world_size
        self._asked = True
        keys = [f"{prefix}/stacks/{rank}" for rank in range(count)]
        board.exchange(put={f"{prefix}/ask": True, keys[0]: take_stacks()})
        deadline = time.monotonic() + self._timing.grace + 2 * self._timing.beat
        while None in (notes := board.exchange(keys)).values() and time.monotonic() < deadline:
            time.sleep(0.1)
        stacks = [notes[key] or {"text": "no answer\n", "waits": False} for key in keys]
        names = [f"rank {r} on host {sign['host'] if sign else '?'}" for r, sign in enumerate(signs)]
        steps = [sign["step"] if sign else -1 for sign in signs]
        where = self._show("".join(f"== {name}\n{stack['text']}" for name, stack in zip(names, stacks)))
        late = max(sign["late"] for sign in signs if sign)
        behind = find_laggards(steps, [stack["waits"] for stack in stacks])
        also = f", and so do ranks {', '.join(map(str, behind[1:]))}" if len(behind) > 1 else ""
        sign = signs[behind[0]]
        self._end(f"hangs in step {steps[behind[0]] + 1} for {late:.0f} s{also}; {where}", behind[0], sign["host"])

    def _watch_alone(self) -> None:
        now = self._progress
        idle = time.monotonic() - now.since
        if 0 < now.limit < idle and not self._closing.is_set():
            where = self._show(take_stacks()["text"])
            self._leave(self._failure(f"hangs in step {now.step + 1} for {idle:.0f} s; {where}"))

    def _show(self, stacks: str) -> str:
        """Writes stacks to stderr, and to a file of log_dir; returns where to find them."""
        print(stacks, file=sys.stderr, flush=True)
        if self._log_dir is None:
            return "its stacks are above" if self.place.alone else "the stacks of all ranks are in the output of rank 0"
        path = self._log_dir / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(stacks, encoding="utf-8")
        except OSError as error:  # a disk that hangs or is full may be why the step hangs
            return f"the stacks are in the output of rank 0 ({path}: {error.strerror})"
        return f"stacks: {path}"

    # The end

    def _failure(self, cause: str) -> Failure:
        return Failure(cause, self.place.rank, self._host, self.place.node)

    def _claim(self, failure: Failure) -> Failure:
        assert self._board is not None
        return Failure.from_json(self._board.claim(f"{self._prefix}/failure", failure.to_json()))

    def _end(self, cause: str, rank: int, host: str, gone: bool = False) -> None:
        node = rank // self.place.local_world_size
        self._leave(self._claim(Failure(cause, rank, host, node, gone=gone)))

    def _leave(self, failure: Failure, code: int | None = None) -> None:
        """Ends this process; an agent tells why, else the first rank of each machine that still can."""
        with self._leaving:  # whoever comes second waits here for the end
            place = self.place
            silent = 0 if code == LOST else failure.rank if failure.gone else None
            first = place.rank - place.local_rank
            speaker = first + 1 if silent == first != place.rank else first
            if not place.agent and place.rank == speaker:
                print(failure.text, file=sys.stderr)
            # Another thread may hold a stream for ever, so flushing must not be waited for.
            flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
            flush.start()
            flush.join(1)
            if self._board is not None and code != LOST:
                self._say_seen(self._board)
            os._exit(code if code == LOST and place.agent else failure.code)

    def _say_seen(self, board: Board) -> None:
        """Tells that this rank has the failure. Without an agent each waits for the others of its machine, since
        torchrun and SLURM end those, unheard, as soon as one has ended; and rank 0, which holds the board, for all."""
        place, first = self.place, self.place.rank - self.place.local_rank
        ranks = range(place.world_size) if self._hub else range(first, first + place.local_world_size)
        keys = [f"{self._prefix}/seen/{rank}" for rank in ranks]
        deadline = time.monotonic() + self._timing.grace + 2 * self._timing.beat
        try:
            board.exchange(put={f"{self._prefix}/seen/{place.rank}": True})
            while not place.agent and time.monotonic() < deadline and None in board.exchange(keys).values():
                time.sleep(0.1)
        except LostError:
            pass
