"""The board of a run: a few short notes that all its processes read and write, over TCP.

It is not torch's store: an operation of that may wait for ever when packets are dropped, and an agent without torch
starts at once. Every exchange is one line of JSON each way, and ends within a time limit.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.place import with_port

LONGEST = 1 << 25  # bytes of a line: the stacks of a rank are a few hundred kilobytes at most


class LostError(Exception):
    """The board does not answer any more; the text says how that showed."""


class Hub:
    """Holds the board, in the agent of node 0; where no agent is, in rank 0. Serves until it is closed."""

    def __init__(self, port: int, local: bool = False) -> None:
        """port: 0 takes a free one. local: answers to this machine only. Raises UserError where the port is taken."""
        self._notes: dict[str, Any] = {}
        self._lock = threading.Lock()
        hub = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                while line := self.rfile.readline(LONGEST):
                    self.wfile.write(_line(hub._answer(json.loads(line))))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, request_queue_size = True, 1024

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client went away, or was none of ours

        # Built unbound, since only create_server listens to IPv4 and IPv6 alike.
        self._server = Server(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = _listen(port, local)
        self.port: int = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            self._notes.update(request["put"])
            for key, note in request["claim"].items():
                self._notes.setdefault(key, note)
            return {key: self._notes.get(key) for key in (*request["claim"], *request["ask"])}


class Board:
    """One connection to the board. Threads may share it."""

    def __init__(self, connection: socket.socket, where: str, limit: float) -> None:
        """where: HOST:PORT, for messages. limit: seconds that an exchange may take."""
        connection.settimeout(limit)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.where = where
        self._connection, self._reader = connection, connection.makefile("rb")
        self._limit, self._lock = limit, threading.Lock()

    def exchange(
        self, ask: Iterable[str] = (), put: Mapping[str, Any] | None = None, claim: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Writes notes and reads notes, as one indivisible act.

        put: notes that replace what is there. claim: notes that are written only where nothing is. Returns the notes
        claimed and asked for; None where there is none. Raises LostError.
        """
        with self._lock:
            try:
                self._connection.sendall(_line({"put": put or {}, "claim": claim or {}, "ask": list(ask)}))
                line = self._reader.readline(LONGEST)
            except TimeoutError:
                raise LostError(f"no answer from the master {self.where} for {self._limit:.0f} s") from None
            except OSError as error:
                raise LostError(f"lost touch with the master {self.where}: {error.strerror or error}") from None
        if not line.endswith(b"\n"):
            raise LostError(f"lost touch with the master {self.where}: it has ended")
        return json.loads(line)

    def claim(self, key: str, note: Any) -> Any:
        """What holds under the key: the note, or the one that was there before. Raises LostError."""
        return self.exchange(claim={key: note})[key]

    def close(self) -> None:
        self._connection.close()


def reach(addr: str, port: int, patience: float, limit: float, between: Callable[[], None] | None = None) -> Board:
    """Connects to the board, trying for `patience` seconds; its exchanges may then take `limit` seconds each.

    between: called between two tries. Raises UserError that says what stands in the way.
    """
    deadline = time.monotonic() + patience
    where = with_port(addr, port)
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((addr, port), timeout=max(0.5, min(left, 5)))
            board = Board(connection, where, max(0.5, min(left, limit)))
            board.exchange()
            connection.settimeout(limit)
            board._limit = limit
            return board
        except (OSError, LostError, ValueError, UnicodeError) as error:
            problem = _problem(error, addr, port)
        if time.monotonic() + 0.3 > deadline:
            raise UserError(f"the master {where}: {problem}, tried for {patience:.0f} s")
        if between is not None:
            between()
        time.sleep(0.3)


def _problem(error: Exception, addr: str, port: int) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return (
            f"the name {addr} does not resolve; give MASTER_ENDPOINT (--master-addr) as an address, or mend the names"
        )
    if isinstance(error, ConnectionRefusedError):
        return "refused; is node 0 started, is it on that machine, and has it the same MASTER_PORT (--master-port)?"
    if isinstance(error, TimeoutError):
        return f"no answer; does a firewall between the machines drop packets to port {port}?"
    if isinstance(error, (LostError, ValueError)):
        return "something answers there that is not fm9g; choose another MASTER_PORT (--master-port)"
    assert isinstance(error, OSError)
    return f"{error.strerror or error}; is the network up, is the address right?"


def _listen(port: int, local: bool) -> socket.socket:
    try:
        if local:
            return socket.create_server(("127.0.0.1", port), backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of this machine: {getattr(error, 'strerror', None) or error}; choose another --master-port "
            "(MASTER_PORT), the same on all nodes, or end what uses it; of several nodes only one has RANK 0"
        ) from None


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
