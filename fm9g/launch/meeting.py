"""How the agents of all nodes find each other before anything is started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.agree import DisagreementError, check_same
from fm9g.launch.board import Board, LostError
from fm9g.launch.failure import INTERRUPTED, OTHER, USER, EndError, Failure, Timing
from fm9g.launch.place import Nodes

POLL = 0.1  # seconds between two looks at the board


class Meeting:
    """Every agent says hello under the number of its node. Node 0 waits for all and tells when they are complete; the
    others compare themselves with node 0 first."""

    def __init__(
        self, board: Board, nodes: Nodes, host: str, timing: Timing, same: Mapping[str, Any], interruption: Callable
    ) -> None:
        """same: what all nodes must have alike. interruption: the name of the signal that came, else None."""
        self._board, self._nodes, self._host, self._timing = board, nodes, host, timing
        self._interruption = interruption
        own = {"nproc (GPUS_PER_NODE)": nodes.nproc, "nnodes (NNODES)": nodes.nnodes, **same}
        self._hello = json.loads(json.dumps({"host": host, "pid": os.getpid(), "same": own}))

    def hold(self) -> tuple[float, list[str]]:
        """Waits for all nodes. Returns when that was, in seconds of node 0's Unix time, and their hosts.

        Raises EndError, the same on all nodes; UserError where a run of others is under way; LostError.
        """
        me = self._nodes.node_rank
        if me:
            self._compare(self._await("hello/0"))
        holder = self._board.claim(f"hello/{me}", self._hello)
        if holder != self._hello:
            self._refuse(
                f"this node number was given twice: to host {holder['host']} (process {holder['pid']}) and to host "
                f"{self._host} (process {os.getpid()}); give each node its own RANK (--node-rank)"
            )
        if not me:
            self._gather()
        begun = self._await("begun")
        return begun["time"], begun["hosts"]

    def _compare(self, first: Any) -> None:
        try:
            check_same([first["same"], self._hello["same"]], [first["host"], self._host], "node")
        except DisagreementError as error:
            self._refuse(str(error))

    def _gather(self) -> None:
        count = self._nodes.nnodes
        keys = [f"hello/{node}" for node in range(count)]
        deadline = time.monotonic() + self._timing.timeout
        while True:
            notes = self._look(keys)
            missing = [str(node) for node, key in enumerate(keys) if notes[key] is None]
            if not missing:
                hosts = [notes[key]["host"] for key in keys]
                self._board.exchange(put={"begun": {"time": time.time(), "hosts": hosts}})
                return
            if time.monotonic() > deadline:
                numbers, seconds = ", ".join(missing), self._timing.timeout
                self._end(
                    f"of {count} nodes, number {numbers} did not appear within {seconds:.0f} s; start the same command "
                    "there with its own RANK (--node-rank)"
                )
            time.sleep(POLL)

    def _await(self, key: str) -> Any:
        """The note under a key once it is there."""
        deadline = time.monotonic() + self._timing.timeout + self._timing.settle
        while (note := self._look([key])[key]) is None:
            if time.monotonic() > deadline:
                raise LostError(f"the master {self._board.where} answers, but does not go on")
            time.sleep(POLL)
        return note

    def _look(self, keys: list[str]) -> dict[str, Any]:
        notes = self._board.exchange([*keys, "0/failure"])
        if notes["0/failure"] and not any(notes[key] for key in keys if key == "begun"):
            raise EndError(Failure.from_json(notes["0/failure"]))
        if name := self._interruption():
            self._end(f"interrupted by {name}", INTERRUPTED)
        return notes

    def _refuse(self, cause: str) -> None:
        """Ends all nodes because of this one, but this one alone where the others are at work already."""
        if self._board.exchange(["begun"])["begun"]:
            raise UserError(f"{self._failure(cause, USER).message}; the run at that port is under way")
        self._end(cause, USER)

    def _end(self, cause: str, code: int = OTHER) -> None:
        claimed = self._board.claim("0/failure", self._failure(cause, code).to_json())
        raise EndError(Failure.from_json(claimed))

    def _failure(self, cause: str, code: int) -> Failure:
        return Failure(cause, None, self._host, self._nodes.node_rank, code)
