"""The board of a run: a few short notes that all its processes read and write, over TCP.

It is not torch's store: that lets in whoever reaches its port, an operation of it may wait for ever when packets are
dropped, and an agent without torch starts at once (benchmarks/launch/elastic.md has the figures).

The server begins with a greeting and a nonce. Then each exchange is a frame there and a frame back:

    4 bytes: length n | 32 bytes: HMAC-SHA256 of nonce, direction, number of the exchange, content | n bytes: JSON

Its key is made of the run's secret (FM9G_SECRET), so that nobody else can write, read, repeat or change a frame unseen.
Every exchange ends within a time limit. What is not signed is closed at once, whatever it sends.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import resource
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.place import SECRET, with_port

LOOPBACK = "127.0.0.1"
LONGEST = 1 << 25  # bytes of a frame: the stacks of a rank are a few hundred kilobytes at most
_FIRST = 1 << 12  # bytes of the first frame of a connection, which anybody may have sent
_MOST = 1 << 28  # bytes of all notes
_PATIENCE = 10.0  # seconds that a connection has for its first frame
_GREETING = b"fm9g board 2\n"
_NONCE = 32  # bytes
_HEAD = struct.Struct("!I32s")
_REFUSED = _HEAD.pack(0, bytes(32))  # instead of an answer


class LostError(Exception):
    """The board does not answer any more; the text says how that showed."""


class RefusedError(Exception):
    """The board holds another secret."""


class _Signer:
    """Signs the frames of one connection."""

    def __init__(self, secret: str, nonce: bytes) -> None:
        self._key, self._nonce = hashlib.sha256(b"fm9g board\0" + secret.encode()).digest(), nonce

    def frame(self, direction: bytes, number: int, values: Any) -> bytes:
        content = json.dumps(values).encode()
        return _HEAD.pack(len(content), self._sign(direction, number, content)) + content

    def holds(self, signature: bytes, direction: bytes, number: int, content: bytes) -> bool:
        return hmac.compare_digest(signature, self._sign(direction, number, content))

    def _sign(self, direction: bytes, number: int, content: bytes) -> bytes:
        head = self._nonce + direction + number.to_bytes(8, "big")
        return hmac.new(self._key, head + content, hashlib.sha256).digest()


class Hub:
    """Holds the board, in the agent of node 0; where no agent is, in rank 0. Serves until it is closed."""

    def __init__(self, port: int, secret: str, local: bool = False) -> None:
        """port: 0 takes a free one. local: answers to this machine only.

        Raises UserError where the port is taken, and OSError where the system refuses what a server needs.
        """
        self._secret, self._notes = secret, dict[str, Any]()
        self._sizes, self._size = dict[str, int](), 0  # bytes: of each note, and of all
        # Connections that have not yet shown the secret: when there are too many, the oldest goes.
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._most_strangers = max(16, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._socket = _listen(port, local)
        self.port: int = self._socket.getsockname()[1]
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=[started], name="board", daemon=True)
        self._thread.start()
        started.result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except OSError as error:
            if started.done():
                raise
            started.set_exception(error)  # else whoever waits would wait for ever

    async def _serve(self, started: Future[None]) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        # What a stranger does to a connection is no news, nor that there are too many of them for a moment.
        self._loop.set_exception_handler(lambda loop, context: None)
        server = await asyncio.start_server(self._talk, sock=self._socket, backlog=1024)
        started.set_result(None)
        await self._end.wait()
        server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        signer = _Signer(self._secret, nonce := secrets.token_bytes(_NONCE))
        if len(self._strangers) >= self._most_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]  # now: its own end comes later, when others may have come, too
            oldest.transport.abort()
        self._strangers[writer] = None
        try:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            writer.write(_GREETING + nonce)
            request = await asyncio.wait_for(_read_signed(reader, signer, 0, _FIRST), _PATIENCE)
            self._strangers.pop(writer, None)
            number = 0
            while True:
                writer.write(signer.frame(b"answer", number, self._answer(request)))
                await writer.drain()
                number += 1
                request = await _read_signed(reader, signer, number, LONGEST)
        except RefusedError:
            writer.write(_REFUSED)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError):
            pass  # it went away, or was none of ours
        finally:
            self._strangers.pop(writer, None)
            writer.close()

    def _answer(self, request: Any) -> dict[str, Any]:
        """Raises ValueError for what is no request, and for more than the board may hold."""
        if not isinstance(request, dict):
            raise ValueError("no request")
        put, claim, ask = request.get("put"), request.get("claim"), request.get("ask")
        if not (isinstance(put, dict) and isinstance(claim, dict) and isinstance(ask, list)):
            raise ValueError("no request")
        for key, note in (put | {key: note for key, note in claim.items() if key not in self._notes}).items():
            size = len(key) + len(json.dumps(note))
            total = self._size + size - self._sizes.get(key, 0)
            if total > _MOST:
                raise ValueError("the board is full")
            self._notes[key], self._sizes[key], self._size = note, size, total
        return {str(key): self._notes.get(str(key)) for key in (*claim, *ask)}


async def _read_signed(reader: asyncio.StreamReader, signer: _Signer, number: int, longest: int) -> Any:
    """Raises RefusedError for another secret, ValueError for what is no frame, EOFError at the end."""
    length, signature = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    if length > longest:
        raise ValueError("too long")
    content = await reader.readexactly(length)
    if not signer.holds(signature, b"ask", number, content):
        raise RefusedError
    return json.loads(content)


class Board:
    """One connection to the board. Threads may share it."""

    def __init__(self, connection: socket.socket, where: str, limit: float, secret: str) -> None:
        """where: HOST:PORT, for messages. limit: seconds that an exchange may take. Raises LostError."""
        connection.settimeout(limit)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.where = where
        self._connection, self._limit = connection, limit
        self._lock, self._number = threading.Lock(), 0
        try:
            greeting = self._read(len(_GREETING) + _NONCE, time.monotonic() + limit)
        except TimeoutError:
            raise LostError(f"{where} accepts, and says nothing") from None
        if not greeting.startswith(_GREETING):
            raise LostError(f"{where} is no board of fm9g, or one of another version")
        self._signer = _Signer(secret, greeting[len(_GREETING) :])

    def exchange(
        self, ask: Iterable[str] = (), put: Mapping[str, Any] | None = None, claim: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Writes notes and reads notes, as one indivisible act.

        put: notes that replace what is there. claim: notes that are written only where nothing is. Returns the notes
        claimed and asked for; None where there is none. Raises LostError, and RefusedError for another secret.
        """
        request = {"put": put or {}, "claim": claim or {}, "ask": list(ask)}
        with self._lock:
            number, self._number = self._number, self._number + 1
            deadline = time.monotonic() + self._limit
            self._connection.settimeout(self._limit)
            try:
                self._connection.sendall(self._signer.frame(b"ask", number, request))
                head = self._read(_HEAD.size, deadline)
                if head == _REFUSED:
                    raise RefusedError
                length, signature = _HEAD.unpack(head)
                if length > LONGEST + _MOST:
                    raise LostError(f"the master {self.where} gives no answer of fm9g")
                content = self._read(length, deadline)
            except TimeoutError:
                raise LostError(f"no answer from the master {self.where} for {self._limit:.0f} s") from None
            except OSError as error:
                raise LostError(f"lost touch with the master {self.where}: {error.strerror or error}") from None
        if not self._signer.holds(signature, b"answer", number, content):
            raise LostError(f"the master {self.where} gives an answer that its run did not sign")
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._connection.recv(min(count - len(data), 1 << 16))
            if not part:
                raise LostError(f"lost touch with the master {self.where}: it has ended")
            data += part
        return bytes(data)

    def claim(self, key: str, note: Any) -> Any:
        """What holds under the key: the note, or the one that was there before. Raises LostError."""
        return self.exchange(claim={key: note})[key]

    def close(self) -> None:
        self._connection.close()


def reach(
    addr: str, port: int, secret: str, patience: float, limit: float, between: Callable[[], None] | None = None
) -> Board:
    """Connects to the board, trying for `patience` seconds; its exchanges may then take `limit` seconds each.

    between: called between two tries. Raises UserError that says what stands in the way.
    """
    deadline = time.monotonic() + patience
    where = with_port(addr, port)
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((addr, port), timeout=max(0.5, min(left, 5)))
            board = Board(connection, where, max(0.5, min(left, limit)), secret)
            board.exchange()
            board._limit = limit
            return board
        except (OSError, LostError, RefusedError, UnicodeError) as error:
            problem = _problem(error, addr, port)
        if time.monotonic() + 0.3 > deadline:
            raise UserError(f"the master {where}: {problem}, tried for {patience:.0f} s")
        if between is not None:
            between()
        time.sleep(0.3)


def warn_without_secret(nodes: int, port: int, secret: str) -> None:
    """Tells the user of a run that others can end."""
    if not secret:
        who = "whoever has an account on this machine" if nodes == 1 else f"whoever reaches port {port} of this machine"
        print(
            f"note: {SECRET} is not set: {who} can end this run, and read its configuration and stacks; "
            "`fm9g train --print-secret` makes one, to be set on all machines",
            file=sys.stderr,
        )


def _problem(error: Exception, addr: str, port: int) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return (
            f"the name {addr} does not resolve; give MASTER_ENDPOINT (--master-addr) as an address, or mend the names"
        )
    if isinstance(error, ConnectionRefusedError):
        return "refused; is node 0 started, is it on that machine, and has it the same MASTER_PORT (--master-port)?"
    if isinstance(error, TimeoutError):
        return f"no answer; does a firewall between the machines drop packets to port {port}?"
    if isinstance(error, RefusedError):
        return f"it has another secret than this process; give {SECRET} the same value on all machines of the run"
    if isinstance(error, LostError):
        return "something answers there that is not fm9g; choose another MASTER_PORT (--master-port)"
    assert isinstance(error, OSError)
    return f"{error.strerror or error}; is the network up, is the address right?"


def _listen(port: int, local: bool) -> socket.socket:
    try:
        if local:
            return socket.create_server((LOOPBACK, port), backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of this machine: {getattr(error, 'strerror', None) or error}; choose another --master-port "
            "(MASTER_PORT), the same on all nodes, or end what uses it; of several nodes only one has RANK 0"
        ) from None
