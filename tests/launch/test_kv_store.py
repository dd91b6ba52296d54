"""The KV store accepts processes with the secret of the run, and rejects everybody else, whatever they send."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch.attacker import ATTACKS, attack, drain, frame

from fm9g.errors import UserError
from fm9g.launch.kv_store import LOOPBACK, ConnectionLostError, KVClient, KVServer, connect

SECRET = "the secret of these stores"
HERE = Path(__file__).parent


@pytest.fixture
def kv_server(request: pytest.FixtureRequest) -> Iterator[KVServer]:
    """Parameters, if any, are further arguments."""
    created = KVServer(0, SECRET, loopback_only=True, **getattr(request, "param", {}))
    yield created
    created.close()


def new_client(kv_server: KVServer, secret: str = SECRET) -> KVClient:
    return connect(LOOPBACK, kv_server.port, secret, connect_timeout=20.0, request_timeout=20.0)


def stranger(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=20)


def test_who_has_the_secret_reads_and_writes(kv_server: KVServer) -> None:
    one, other = new_client(kv_server), new_client(kv_server)
    one.transact(set={"a": {"deep": [1, "é"]}})
    assert other.transact(["a", "b"]) == {"a": {"deep": [1, "é"]}, "b": None}
    assert one.set_if_absent("c", 1) == other.set_if_absent("c", 2) == 1
    long = "x" * (1 << 21)
    one.transact(set={"long": long})
    assert other.transact(["long"])["long"] == long


def test_threads_share_a_connection(kv_server: KVServer) -> None:
    kv_client = new_client(kv_server)
    threads = [
        threading.Thread(target=lambda n=n: [kv_client.transact(set={str(n): i}) for i in range(50)]) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kv_client.transact(map(str, range(8))) == {str(n): 49 for n in range(8)}


@pytest.mark.parametrize("secret", ["", "the secret of others", SECRET + "x"])
def test_another_secret_is_refused(kv_server: KVServer, secret: str) -> None:
    with pytest.raises(UserError, match="another secret than this process; give FM9G_SECRET the same value on all"):
        connect(LOOPBACK, kv_server.port, secret, connect_timeout=0.5, request_timeout=5.0)


@pytest.mark.parametrize("name", ATTACKS)
def test_strangers_write_and_read_nothing(kv_server: KVServer, name: str) -> None:
    kv_client = new_client(kv_server)
    kv_client.transact(set={"0/rank/0": "precious"})
    assert b"precious" not in attack((LOOPBACK, kv_server.port), ATTACKS[name])
    assert kv_client.transact(["0/failure", "0/done", "0/rank/0", "0/rank/1"]) == {
        "0/failure": None,
        "0/done": None,
        "0/rank/0": "precious",
        "0/rank/1": None,
    }


def recorded(port: int) -> bytes:
    """What a process of the run sends that sets an entry."""
    wire, sent = socket.create_server((LOOPBACK, 0)), bytearray()

    def copy(source: socket.socket, target: socket.socket, recorded: bytearray) -> None:
        while data := source.recv(1 << 16):
            recorded += data
            target.sendall(data)

    def carry() -> None:
        client, _ = wire.accept()
        server = stranger(port)
        threading.Thread(target=copy, args=(server, client, bytearray()), daemon=True).start()
        copy(client, server, sent)

    threading.Thread(target=carry, daemon=True).start()
    kv_client = connect(LOOPBACK, wire.getsockname()[1], SECRET, connect_timeout=20.0, request_timeout=20.0)
    kv_client.transact(set={"done": True})
    kv_client.close()
    return bytes(sent)


def test_what_was_recorded_cannot_be_repeated(kv_server: KVServer) -> None:
    sent = recorded(kv_server.port)
    kv_client = new_client(kv_server)
    kv_client.transact(set={"done": False})
    with stranger(kv_server.port) as connection:
        connection.sendall(sent)
        assert b'"done"' not in drain(connection)
    assert kv_client.transact(["done"]) == {"done": False}


def test_a_server_without_the_secret_cannot_answer() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.sendall(b"fm9g kv_store 3\n" + bytes(32) + frame(b"{}"))
            drain(connection)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match="is not fm9g"):
            connect(LOOPBACK, server.getsockname()[1], SECRET, connect_timeout=0.5, request_timeout=5.0)


def test_a_changed_frame_is_refused(kv_server: KVServer) -> None:
    sent = recorded(kv_server.port)
    changed = sent.replace(b"true", b"null")
    assert changed != sent
    with stranger(kv_server.port) as connection:
        connection.sendall(changed)
        drain(connection)
    assert new_client(kv_server).transact(["done"]) == {"done": True}


@pytest.mark.parametrize("kv_server", [{"handshake_timeout": 1000.0}], indirect=True)
def test_many_slow_connections_keep_nobody_out(kv_server: KVServer) -> None:
    kv_client = new_client(kv_server)
    max_clients = kv_server.max_unauthenticated
    idle = [stranger(kv_server.port) for _ in range(max_clients + 50)]
    new_client(kv_server).transact(set={"late": True})
    assert kv_client.transact(["late"]) == {"late": True}
    for connection in idle[:50]:  # the oldest ones had to go
        drain(connection)
        connection.settimeout(0.0)
        assert connection.recv(1) == b""
    for connection in idle:
        connection.close()


def test_signed_nonsense_closes_the_connection_and_nothing_else(kv_server: KVServer) -> None:
    kv_client = new_client(kv_server)
    for request in (
        [],
        {"set": 1, "set_if_absent": {}, "get": []},
        {"set": {}, "set_if_absent": {}, "get": 3},
        7,
        None,
    ):
        peer = new_client(kv_server)
        peer._connection.sendall(peer._signer.frame(b"request", 1, request))
        peer._number = 2
        with pytest.raises(ConnectionLostError):
            peer.transact()
    assert kv_client.transact(["a"]) == {"a": None}


@pytest.mark.parametrize("kv_server", [{"max_bytes": 10_000}], indirect=True)
def test_the_store_holds_so_much_and_no_more(kv_server: KVServer) -> None:
    kv_client = new_client(kv_server)
    for i in range(20):  # one entry may be written again and again
        kv_client.transact(set={"a": "x" * 5000 + str(i)})
    with pytest.raises(ConnectionLostError):
        kv_client.transact(set={"b": "x" * 6000})
    assert new_client(kv_server).transact(["a"])["a"].endswith("19")
    new_client(kv_server).transact(set={"c": "there is room for this one"})


def test_a_server_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    found: list[object] = []

    def start() -> None:
        with pytest.raises(OSError, match="Too many open files") as raised:
            KVServer(0, SECRET, loopback_only=True)
        found.append(raised.value)

    monkeypatch.setattr("asyncio.start_server", too_many)
    waiting = threading.Thread(target=start, daemon=True)
    waiting.start()
    waiting.join(10)
    assert found
