"""The KV store of a run: a few short entries that all its processes read and write, over TCP.

It replaces torch's store, which accepts every connection, may block for ever when packets are dropped, and would make
the agent import torch (measured in benchmarks/launch/elastic.md).

The server sends a greeting and a nonce. Then each transaction is a request frame and a response frame:

    4 bytes: length n | 32 bytes: HMAC-SHA256 of nonce, direction, transaction number, content | n bytes: JSON

The HMAC key is derived from the run's secret (FM9G_SECRET), so nobody else can forge, replay, reorder or change a
frame; frames are not encrypted. Every transaction has a deadline. The server closes a connection at its first
frame with a wrong signature.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import resource
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from fm9g.errors import UserError
from fm9g.launch.dist_env import SECRET_VARIABLE, join_host_port

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
MAX_FRAME_BYTES = 1 << 25  # the stacks of a rank, the largest entry, are a few hundred kilobytes
_MAX_FIRST_FRAME_BYTES = 1 << 12  # small, since anybody can send it
_MAX_STORE_BYTES = 1 << 28  # all entries together
_GREETING = b"fm9g kv_store 3\n"
_NONCE_BYTES = 32
_HEADER = struct.Struct("!I32s")
_AUTH_FAILED = _HEADER.pack(0, bytes(32))  # instead of an answer


class ConnectionLostError(Exception):
    """The KV store stopped answering; the text names the symptom."""


class AuthenticationError(Exception):
    """The two sides of a connection have different secrets."""


class _Signer:
    """Signs the frames of one connection."""

    def __init__(self, secret: str, nonce: bytes) -> None:
        self._key, self._nonce = hashlib.sha256(b"fm9g kv_store\0" + secret.encode()).digest(), nonce

    def frame(self, direction: bytes, number: int, values: Any) -> bytes:
        content = json.dumps(values).encode()
        return _HEADER.pack(len(content), self._sign(direction, number, content)) + content

    def verify(self, signature: bytes, direction: bytes, number: int, content: bytes) -> bool:
        return hmac.compare_digest(signature, self._sign(direction, number, content))

    def _sign(self, direction: bytes, number: int, content: bytes) -> bytes:
        head = self._nonce + direction + number.to_bytes(8, "big")
        return hmac.new(self._key, head + content, hashlib.sha256).digest()


class KVServer:
    """Hosts the KV store: in the agent of node 0 or, without an agent, in rank 0. Serves until closed."""

    def __init__(
        self,
        port: int,
        secret: str,
        loopback_only: bool = False,
        *,
        handshake_timeout: float = 10.0,
        max_bytes: int = _MAX_STORE_BYTES,
    ) -> None:
        """
        Args:
            port: 0 takes a free one.
            loopback_only: listen to this machine only.
            handshake_timeout: seconds until the first frame of a connection is complete.
            max_bytes: of all entries together.

        Raises UserError if the port is taken, OSError if the system lacks resources, such as file descriptors.
        """
        self._secret, self._entries = secret, dict[str, Any]()
        self._handshake_timeout, self._max_bytes = handshake_timeout, max_bytes
        self._entry_sizes, self._total_size = dict[str, int](), 0  # bytes
        # Connections without a valid first frame, oldest first: if there are too many, the oldest is closed.
        self._unauthenticated: dict[asyncio.StreamWriter, None] = {}
        self.max_unauthenticated = max(16, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._socket = _listen(port, loopback_only)
        self.port: int = self._socket.getsockname()[1]
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=[started], name="kv_store", daemon=True)
        self._thread.start()
        started.result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except OSError as error:
            if started.done():
                raise
            started.set_exception(error)  # else the constructor would wait for ever

    async def _serve(self, started: Future[None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        # Without it, asyncio would print every connection that a stranger breaks.
        self._loop.set_exception_handler(lambda loop, context: None)
        server = await asyncio.start_server(self._handle_connection, sock=self._socket, backlog=1024)
        started.set_result(None)
        await self._stop.wait()
        server.close()

    async def _handle_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        signer = _Signer(self._secret, nonce := secrets.token_bytes(_NONCE_BYTES))
        if len(self._unauthenticated) >= self.max_unauthenticated:
            oldest = next(iter(self._unauthenticated))
            del self._unauthenticated[oldest]  # now: its handler ends later, and more may connect until then
            oldest.transport.abort()
        self._unauthenticated[writer] = None
        try:
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            writer.write(_GREETING + nonce)
            request = await asyncio.wait_for(
                _read_signed(reader, signer, 0, _MAX_FIRST_FRAME_BYTES), self._handshake_timeout
            )
            self._unauthenticated.pop(writer, None)
            number = 0
            while True:
                writer.write(signer.frame(b"response", number, self._handle_request(request)))
                await writer.drain()
                number += 1
                request = await _read_signed(reader, signer, number, MAX_FRAME_BYTES)
        except AuthenticationError:
            writer.write(_AUTH_FAILED)
        except (OSError, EOFError, ValueError, asyncio.TimeoutError):
            pass  # the peer is gone, or does not speak this protocol
        finally:
            self._unauthenticated.pop(writer, None)
            writer.close()

    def _handle_request(self, request: Any) -> dict[str, Any]:
        """Raises ValueError for an invalid request, and if the KV store is full."""
        if not isinstance(request, dict):
            raise ValueError("invalid request")
        to_set, if_absent, to_get = request.get("set"), request.get("set_if_absent"), request.get("get")
        if not (isinstance(to_set, dict) and isinstance(if_absent, dict) and isinstance(to_get, list)):
            raise ValueError("invalid request")
        absent = {key: value for key, value in if_absent.items() if key not in self._entries}
        for key, value in (to_set | absent).items():
            size = len(key) + len(json.dumps(value))
            total = self._total_size + size - self._entry_sizes.get(key, 0)
            if total > self._max_bytes:
                raise ValueError("the KV store is full")
            self._entries[key], self._entry_sizes[key], self._total_size = value, size, total
        return {str(key): self._entries.get(str(key)) for key in (*if_absent, *to_get)}


async def _read_signed(reader: asyncio.StreamReader, signer: _Signer, number: int, max_bytes: int) -> Any:
    """Raises AuthenticationError for a wrong signature, ValueError for an invalid frame, EOFError at the end."""
    length, signature = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if length > max_bytes:
        raise ValueError("too long")
    content = await reader.readexactly(length)
    if not signer.verify(signature, b"request", number, content):
        raise AuthenticationError
    return json.loads(content)


class KVClient:
    """One connection to the KV store. Threads may share it."""

    def __init__(self, connection: socket.socket, address: str, timeout: float, secret: str) -> None:
        """address: HOST:PORT, for messages. timeout: seconds per transaction.

        Raises ConnectionLostError.
        """
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = address
        self._connection, self._timeout = connection, timeout
        self._lock, self._number = threading.Lock(), 0
        try:
            greeting = self._read(len(_GREETING) + _NONCE_BYTES, time.monotonic() + timeout)
        except TimeoutError:
            raise ConnectionLostError(f"{address} accepts connections, but sends nothing") from None
        if not greeting.startswith(_GREETING):
            raise ConnectionLostError(f"{address} is not the KV store of this version of fm9g")
        self._signer = _Signer(secret, greeting[len(_GREETING) :])

    def transact(
        self,
        get: Iterable[str] = (),
        set: Mapping[str, Any] | None = None,
        set_if_absent: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes and reads entries in one atomic transaction.

        Args:
            get: keys to read.
            set: entries to write.
            set_if_absent: entries to write only if the key has no entry.

        Returns the entries of set_if_absent and get; None for a key without an entry.
        Raises ConnectionLostError; AuthenticationError if the server has another secret.
        """
        request = {"set": set or {}, "set_if_absent": set_if_absent or {}, "get": list(get)}
        with self._lock:
            number, self._number = self._number, self._number + 1
            deadline = time.monotonic() + self._timeout
            self._connection.settimeout(self._timeout)
            try:
                self._connection.sendall(self._signer.frame(b"request", number, request))
                head = self._read(_HEADER.size, deadline)
                if head == _AUTH_FAILED:
                    raise AuthenticationError
                length, signature = _HEADER.unpack(head)
                if length > MAX_FRAME_BYTES + _MAX_STORE_BYTES:
                    raise ConnectionLostError(f"the master {self.address} sent an invalid answer")
                content = self._read(length, deadline)
            except TimeoutError:
                raise ConnectionLostError(
                    f"no answer from the master {self.address} for {self._timeout:.0f} s"
                ) from None
            except OSError as error:
                raise ConnectionLostError(
                    f"lost the connection to the master {self.address}: {error.strerror or error}"
                ) from None
        if not self._signer.verify(signature, b"response", number, content):
            raise ConnectionLostError(f"the master {self.address} sent an answer with a wrong signature")
        answer: dict[str, Any] = json.loads(content)
        return answer

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._connection.recv(min(count - len(data), 1 << 16))
            if not part:
                raise ConnectionLostError(f"lost the connection to the master {self.address}: it has ended")
            data += part
        return bytes(data)

    def set_if_absent(self, key: str, value: Any) -> Any:
        """Writes an entry unless the key has one; returns the entry of the key. Raises ConnectionLostError."""
        return self.transact(set_if_absent={key: value})[key]

    def close(self) -> None:
        self._connection.close()


def connect(
    addr: str,
    port: int,
    secret: str,
    connect_timeout: float,
    request_timeout: float,
    on_retry: Callable[[], None] | None = None,
) -> KVClient:
    """Connects to the KV store.

    Args:
        connect_timeout: seconds for all tries to connect.
        request_timeout: seconds per transaction.
        on_retry: called between two tries.

    Raises UserError that names the problem.
    """
    deadline = time.monotonic() + connect_timeout
    address = join_host_port(addr, port)
    while True:
        remaining = deadline - time.monotonic()
        try:
            connection = socket.create_connection((addr, port), timeout=max(0.5, min(remaining, 5)))
            kv_client = KVClient(connection, address, max(0.5, min(remaining, request_timeout)), secret)
            kv_client.transact()
            kv_client._timeout = request_timeout
            return kv_client
        except (OSError, ConnectionLostError, AuthenticationError, UnicodeError) as error:
            problem = _problem(error, addr, port)
        if time.monotonic() + 0.3 > deadline:
            raise UserError(f"the master {address}: {problem} (tried for {connect_timeout:.0f} s)")
        if on_retry is not None:
            on_retry()
        time.sleep(0.3)


def warn_without_secret(nnodes: int, port: int, secret: str) -> None:
    """Warns if anybody else can interfere with the run."""
    if not secret:
        who = "anyone with an account on this machine" if nnodes == 1 else f"anyone who reaches port {port} here"
        logger.warning(
            f"{SECRET_VARIABLE} is not set: {who} can end this run, and read its configuration and stacks. Generate a "
            "secret with `fm9g train --print-secret`, and set it on all machines"
        )


def _problem(error: Exception, addr: str, port: int) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"the name {addr} does not resolve; set MASTER_ENDPOINT (--master-addr) to an address, or fix the name"
    if isinstance(error, ConnectionRefusedError):
        return "refused; is node 0 started, is it that machine, and does it use the same MASTER_PORT (--master-port)?"
    if isinstance(error, TimeoutError):
        return f"no answer; does a firewall between the machines drop packets to port {port}?"
    if isinstance(error, AuthenticationError):
        return (
            f"it has another secret than this process; give {SECRET_VARIABLE} the same value on all machines of the run"
        )
    if isinstance(error, ConnectionLostError):
        return "the program that answers there is not fm9g; choose another MASTER_PORT (--master-port)"
    assert isinstance(error, OSError)
    return f"{error.strerror or error}; is the network up, and the address right?"


def _listen(port: int, loopback_only: bool) -> socket.socket:
    try:
        if loopback_only:
            return socket.create_server((LOOPBACK, port), backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of this machine: {getattr(error, 'strerror', None) or error}; choose another --master-port "
            "(MASTER_PORT), the same on all nodes, or end the program that uses it; only one node may have RANK 0"
        ) from None
