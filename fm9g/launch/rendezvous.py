"""How the agents of all nodes find each other before any worker starts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.consistency import RankMismatchError, check_same
from fm9g.launch.dist_env import LaunchConfig
from fm9g.launch.failure import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Failure,
    RunFailedError,
    failure_key,
    record_failure,
)
from fm9g.launch.heartbeat import Timing
from fm9g.launch.kv_store import ConnectionLostError, KVClient

POLL_INTERVAL = 0.1  # seconds between two reads of the KV store
_FIRST_ATTEMPT = 0  # agents meet once, before the first attempt; a failure until then is recorded as that attempt's


class Rendezvous:
    """Every agent writes an entry under the number of its node.

    Node 0 waits for all entries, then writes "started". Each other node first compares itself with node 0.
    """

    def __init__(
        self,
        kv_client: KVClient,
        launch_config: LaunchConfig,
        host: str,
        timing: Timing,
        fingerprint: Mapping[str, Any],
        received_signal: Callable[[], str | None],
    ) -> None:
        """fingerprint: what all nodes must share. received_signal: returns the name of the signal that came, if any."""
        self._kv_client, self._launch_config, self._host, self._timing = kv_client, launch_config, host, timing
        self._received_signal = received_signal
        own = {"nproc (GPUS_PER_NODE)": launch_config.nproc, "nnodes (NNODES)": launch_config.nnodes, **fingerprint}
        self._join_entry = json.loads(json.dumps({"host": host, "pid": os.getpid(), "fingerprint": own}))

    def join(self) -> tuple[float, list[str]]:
        """Waits for all nodes. Returns when they were complete, in node 0's Unix time (seconds), and their hosts.

        Raises RunFailedError, the same on all nodes; UserError if another run uses the port; ConnectionLostError.
        """
        node_rank = self._launch_config.node_rank
        if node_rank:
            self._check_fingerprint(self._wait_for_entry("join/0"))
        registered = self._kv_client.set_if_absent(f"join/{node_rank}", self._join_entry)
        if registered != self._join_entry:
            self._reject(
                f"this node number is given twice: to host {registered['host']} (process {registered['pid']}) and "
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
                node_list, seconds = ", ".join(missing), self._timing.timeout
                self._abort(
                    f"of {count} nodes, number {node_list} did not appear within {seconds:.0f} s; start the same "
                    "command there with its own RANK (--node-rank)"
                )
            time.sleep(POLL_INTERVAL)

    def _wait_for_entry(self, key: str) -> Any:
        deadline = time.monotonic() + self._timing.timeout + self._timing.settle_time
        while (entry := self._poll([key])[key]) is None:
            if time.monotonic() > deadline:
                raise ConnectionLostError(f"the master {self._kv_client.address} answers, but makes no progress")
            time.sleep(POLL_INTERVAL)
        return entry

    def _poll(self, keys: list[str]) -> dict[str, Any]:
        """Reads entries. Ends the rendezvous if a node has failed or a signal has come."""
        failure = failure_key(_FIRST_ATTEMPT)
        entries = self._kv_client.transact([*keys, failure])
        if entries[failure] and not any(entries[key] for key in keys if key == "started"):
            raise RunFailedError(Failure.from_json(entries[failure]))
        if name := self._received_signal():
            self._abort(f"interrupted by {name}", EXIT_INTERRUPTED)
        return entries

    def _reject(self, cause: str) -> None:
        """Ends all nodes because of this one; if the others already train, ends this one only."""
        if self._kv_client.transact(["started"])["started"]:
            message = self._failure(cause, EXIT_USER_ERROR).message
            raise UserError(f"{message}; the run at that port has already started")
        self._abort(cause, EXIT_USER_ERROR)

    def _abort(self, cause: str, code: int = EXIT_FAILURE) -> None:
        raise RunFailedError(record_failure(self._kv_client, _FIRST_ATTEMPT, self._failure(cause, code)))

    def _failure(self, cause: str, code: int) -> Failure:
        return Failure(cause, None, self._host, self._launch_config.node_rank, code)
