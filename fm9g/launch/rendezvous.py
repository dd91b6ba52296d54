"""How the agents of all nodes find each other before anything is started."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.consistency import RankMismatchError, check_same
from fm9g.launch.dist_env import LaunchConfig
from fm9g.launch.failure import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, Failure, RunFailedError, Timing
from fm9g.launch.kv_store import ConnectionLostError, KVClient

POLL_INTERVAL = 0.1  # seconds between two looks at the KV store


class Rendezvous:
    """Every agent says hello under the number of its node. Node 0 waits for all and tells when they are complete; the
    others compare themselves with node 0 first."""

    def __init__(
        self,
        kv_client: KVClient,
        launch_config: LaunchConfig,
        host: str,
        timing: Timing,
        fingerprint: Mapping[str, Any],
        received_signal: Callable,
    ) -> None:
        """fingerprint: what all nodes must have alike. received_signal: the name of the signal that came, else None."""
        self._kv_client, self._launch_config, self._host, self._timing = kv_client, launch_config, host, timing
        self._received_signal = received_signal
        own = {"nproc (GPUS_PER_NODE)": launch_config.nproc, "nnodes (NNODES)": launch_config.nnodes, **fingerprint}
        self._join_entry = json.loads(json.dumps({"host": host, "pid": os.getpid(), "fingerprint": own}))

    def join(self) -> tuple[float, list[str]]:
        """Waits for all nodes. Returns when that was, in seconds of node 0's Unix time, and their hosts.

        Raises RunFailedError, the same on all nodes; UserError where a run of others is under way; ConnectionLostError.
        """
        node_rank = self._launch_config.node_rank
        if node_rank:
            self._check_fingerprint(self._wait_for_entry("join/0"))
        registered = self._kv_client.set_if_absent(f"join/{node_rank}", self._join_entry)
        if registered != self._join_entry:
            self._reject(
                f"this node number was given twice: to host {registered['host']} (process {registered['pid']}) and "
                f"to host {self._host} (process {os.getpid()}); give each node its own RANK (--node-rank)"
            )
        if not node_rank:
            self._wait_for_all_nodes()
        started = self._wait_for_entry("started")
        return started["time"], started["hosts"]

    def _check_fingerprint(self, first: Any) -> None:
        try:
            check_same([first["fingerprint"], self._join_entry["fingerprint"]], [first["host"], self._host], "node")
        except RankMismatchError as error:
            self._reject(str(error))

    def _wait_for_all_nodes(self) -> None:
        count = self._launch_config.nnodes
        keys = [f"join/{node}" for node in range(count)]
        deadline = time.monotonic() + self._timing.timeout
        while True:
            entries = self._poll(keys)
            missing = [str(node) for node, key in enumerate(keys) if entries[key] is None]
            if not missing:
                hosts = [entries[key]["host"] for key in keys]
                self._kv_client.transact(set={"started": {"time": time.time(), "hosts": hosts}})
                return
            if time.monotonic() > deadline:
                numbers, seconds = ", ".join(missing), self._timing.timeout
                self._abort(
                    f"of {count} nodes, number {numbers} did not appear within {seconds:.0f} s; start the same command "
                    "there with its own RANK (--node-rank)"
                )
            time.sleep(POLL_INTERVAL)

    def _wait_for_entry(self, key: str) -> Any:
        """The entry under a key once it is there."""
        deadline = time.monotonic() + self._timing.timeout + self._timing.settle_time
        while (entry := self._poll([key])[key]) is None:
            if time.monotonic() > deadline:
                raise ConnectionLostError(f"the master {self._kv_client.address} answers, but does not go on")
            time.sleep(POLL_INTERVAL)
        return entry

    def _poll(self, keys: list[str]) -> dict[str, Any]:
        entries = self._kv_client.transact([*keys, "0/failure"])
        if entries["0/failure"] and not any(entries[key] for key in keys if key == "started"):
            raise RunFailedError(Failure.from_json(entries["0/failure"]))
        if name := self._received_signal():
            self._abort(f"interrupted by {name}", EXIT_INTERRUPTED)
        return entries

    def _reject(self, cause: str) -> None:
        """Ends all nodes because of this one, but this one alone where the others are at work already."""
        if self._kv_client.transact(["started"])["started"]:
            raise UserError(f"{self._failure(cause, EXIT_USER_ERROR).message}; the run at that port is under way")
        self._abort(cause, EXIT_USER_ERROR)

    def _abort(self, cause: str, code: int = EXIT_FAILURE) -> None:
        recorded = self._kv_client.set_if_absent("0/failure", self._failure(cause, code).to_json())
        raise RunFailedError(Failure.from_json(recorded))

    def _failure(self, cause: str, code: int) -> Failure:
        return Failure(cause, None, self._host, self._launch_config.node_rank, code)
