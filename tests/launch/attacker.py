"""An attacker outside of the run, who tries everything at a port: `attacker.py HOST PORT ...`."""

import json
import random
import socket
import struct
import sys
from contextlib import suppress

ENTRIES = {
    f"{attempt}/{name}": value
    for attempt in range(2)
    for name, value in {
        "failure": {"cause": "\x1b[2Jforged", "rank": None, "host": "x", "node": 0, "code": 0},
        "done": True,
        "dump_stacks": True,
        "rank/0": 3,
        "rank/1": {"heartbeat": 1, "host": "x", "step": 0, "activity": "x", "overdue": 1e9, "finished": True},
        "agent/1": {"heartbeat": 1, "ended": True},
    }.items()
}
FORGED = json.dumps({"set": ENTRIES, "set_if_absent": ENTRIES, "get": list(ENTRIES)}).encode()


def frame(content: bytes, signature: bytes = bytes(32)) -> bytes:
    return struct.pack("!I32s", len(content), signature) + content


ATTACKS = {
    "unsigned": frame(FORGED),
    "the line of an older version": FORGED + b"\n",
    "too long": struct.pack("!I32s", 1 << 31, bytes(32)) + b"x" * (1 << 16),
    "too long for a first one": frame(b"x" * (1 << 20)),
    "half": struct.pack("!I32s", 1000, bytes(32)) + b"x" * 10,
    "nothing": b"",
    "no JSON": frame(b"\0\xff"),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "noise": random.Random(0).randbytes(1 << 16),
}


def drain(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with suppress(OSError):
        while part := connection.recv(1 << 16):
            data += part
    return data


def attack(address: tuple[str, int], content: bytes) -> bytes:
    """What comes back."""
    with suppress(OSError), socket.create_connection(address, timeout=5) as connection:
        with suppress(OSError):  # closed by the other side meanwhile
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
        return drain(connection)
    return b""


if __name__ == "__main__":
    for port in map(int, sys.argv[2:]):
        idle = []
        with suppress(OSError):
            idle = [socket.create_connection((sys.argv[1], port), timeout=5) for _ in range(200)]
        answers = [attack((sys.argv[1], port), content) for content in ATTACKS.values() for _ in range(3)]
        print(sys.argv[1], port, len(idle), b"config" in b"".join(answers))
