"""The board lets in who holds the secret of the run, and nobody else, whatever they send."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch.attacker import ATTACKS, attack, drain, frame

from fm9g.errors import UserError
from fm9g.launch.board import LOOPBACK, Board, Hub, LostError, reach
from fm9g.launch.failure import Failure
from fm9g.launch.place import find_place, find_secret

SECRET = "the secret of these boards"
HERE = Path(__file__).parent


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub(0, SECRET, local=True)
    yield made
    made.close()


def connect(hub: Hub, secret: str = SECRET) -> Board:
    return reach(LOOPBACK, hub.port, secret, patience=20.0, limit=20.0)


def stranger(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=20)


def test_who_has_the_secret_reads_and_writes(hub: Hub) -> None:
    one, other = connect(hub), connect(hub)
    one.exchange(put={"a": {"deep": [1, "é"]}})
    assert other.exchange(["a", "b"]) == {"a": {"deep": [1, "é"]}, "b": None}
    assert one.claim("c", 1) == other.claim("c", 2) == 1
    long = "x" * (1 << 21)
    one.exchange(put={"long": long})
    assert other.exchange(["long"])["long"] == long


def test_threads_share_a_connection(hub: Hub) -> None:
    board = connect(hub)
    threads = [
        threading.Thread(target=lambda n=n: [board.exchange(put={str(n): i}) for i in range(50)]) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.exchange(map(str, range(8))) == {str(n): 49 for n in range(8)}


@pytest.mark.parametrize("secret", ["", "the secret of others", SECRET + "x"])
def test_another_secret_is_refused(hub: Hub, secret: str) -> None:
    with pytest.raises(UserError, match="another secret than this process; give FM9G_SECRET the same value on all"):
        reach(LOOPBACK, hub.port, secret, patience=0.5, limit=5.0)


@pytest.mark.parametrize("name", ATTACKS)
def test_strangers_write_and_read_nothing(hub: Hub, name: str) -> None:
    board = connect(hub)
    board.exchange(put={"0/rank/0": "precious"})
    assert b"precious" not in attack((LOOPBACK, hub.port), ATTACKS[name])
    assert board.exchange(["0/failure", "0/over", "0/rank/0", "0/rank/1"]) == {
        "0/failure": None,
        "0/over": None,
        "0/rank/0": "precious",
        "0/rank/1": None,
    }


def recorded(port: int) -> bytes:
    """What a process of the run sends that puts a note."""
    wire, sent = socket.create_server((LOOPBACK, 0)), bytearray()

    def copy(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        while data := source.recv(1 << 16):
            kept += data
            target.sendall(data)

    def carry() -> None:
        client, _ = wire.accept()
        server = stranger(port)
        threading.Thread(target=copy, args=(server, client, bytearray()), daemon=True).start()
        copy(client, server, sent)

    threading.Thread(target=carry, daemon=True).start()
    board = reach(LOOPBACK, wire.getsockname()[1], SECRET, patience=20.0, limit=20.0)
    board.exchange(put={"over": True})
    board.close()
    return bytes(sent)


def test_what_was_recorded_cannot_be_repeated(hub: Hub) -> None:
    sent = recorded(hub.port)
    board = connect(hub)
    board.exchange(put={"over": False})
    with stranger(hub.port) as connection:
        connection.sendall(sent)
        assert b'"over"' not in drain(connection)
    assert board.exchange(["over"]) == {"over": False}


def test_a_server_without_the_secret_cannot_answer() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.sendall(b"fm9g board 2\n" + bytes(32) + frame(b"{}"))
            drain(connection)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match="is not fm9g"):
            reach(LOOPBACK, server.getsockname()[1], SECRET, patience=0.5, limit=5.0)


def test_a_changed_frame_is_refused(hub: Hub) -> None:
    sent = recorded(hub.port)
    changed = sent.replace(b"true", b"null")
    assert changed != sent
    with stranger(hub.port) as connection:
        connection.sendall(changed)
        drain(connection)
    assert connect(hub).exchange(["over"]) == {"over": True}


def test_many_slow_connections_keep_nobody_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fm9g.launch.board._PATIENCE", 1000.0)
    board = connect(hub)
    most = hub._most_strangers
    idle = [stranger(hub.port) for _ in range(most + 50)]
    connect(hub).exchange(put={"late": True})
    assert board.exchange(["late"]) == {"late": True}
    for connection in idle[:50]:  # the oldest ones had to go
        drain(connection)
        connection.settimeout(0.0)
        assert connection.recv(1) == b""
    for connection in idle:
        connection.close()


def test_signed_nonsense_closes_the_connection_and_nothing_else(hub: Hub) -> None:
    board = connect(hub)
    for request in ([], {"put": 1, "claim": {}, "ask": []}, {"put": {}, "claim": {}, "ask": 3}, 7, None):
        peer = connect(hub)
        peer._connection.sendall(peer._signer.frame(b"ask", 1, request))
        peer._number = 2
        with pytest.raises(LostError):
            peer.exchange()
    assert board.exchange(["a"]) == {"a": None}


def test_the_board_holds_so_much_and_no_more(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fm9g.launch.board._MOST", 10_000)
    board = connect(hub)
    for i in range(20):  # one note may be written again and again
        board.exchange(put={"a": "x" * 5000 + str(i)})
    with pytest.raises(LostError):
        board.exchange(put={"b": "x" * 6000})
    assert connect(hub).exchange(["a"])["a"].endswith("19")
    connect(hub).exchange(put={"c": "there is room for this one"})


def test_a_server_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    found: list[object] = []

    def start() -> None:
        with pytest.raises(OSError, match="Too many open files") as raised:
            Hub(0, SECRET, local=True)
        found.append(raised.value)

    monkeypatch.setattr("asyncio.start_server", too_many)
    waiting = threading.Thread(target=start, daemon=True)
    waiting.start()
    waiting.join(10)
    assert found


def test_a_secret_is_long_and_is_shown_nowhere() -> None:
    with pytest.raises(UserError, match="FM9G_SECRET: found 5 characters, expected at least 16"):
        find_secret({"FM9G_SECRET": "short"})
    assert SECRET not in repr(find_place({"FM9G_SECRET": SECRET}))
    made = subprocess.run([sys.executable, "-m", "fm9g", "train", "--print-secret"], capture_output=True, text=True)
    assert len(made.stdout.strip()) == 32
    assert find_secret({"FM9G_SECRET": made.stdout})


@pytest.mark.parametrize(
    "record",
    [
        {"cause": "x", "rank": 1, "host": "h", "node": 0, "code": 0},
        {"cause": "x", "rank": 1, "host": "h", "node": 0, "code": 256},
        {"cause": "x", "rank": "1", "host": "h", "node": 0},
        {"cause": 5, "rank": 1, "host": "h", "node": 0},
        {"unknown": 5},
        3,
        "text",
        [],
    ],
)
def test_a_failure_is_never_a_success(record: object) -> None:
    failure = Failure.from_json(record)
    assert 0 < failure.code < 256
    assert failure.cause


def test_what_another_machine_says_cannot_act_on_a_terminal() -> None:
    failure = Failure("\x1b[2Jgone\r", 1, "\x1b]0;host\x07", 0, detail="a\x1b[31m\nb")
    assert "\x1b" not in failure.text
    assert "\r" not in failure.text
    assert len(failure.text.split("\n")) == 3
