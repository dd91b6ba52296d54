"""Agents on this machine represent nodes. Their workers (worker.py) start fast, since they do not import torch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TIMEOUT = 6.0  # seconds: what runs that try the timeout call a minute
SECRET = "the secret of these runs"
PATIENCE = 30.0  # seconds: the timeout of all others, and what a slow machine has for anything: half of it is silence
SLACK = 4.0  # seconds that two busy cores may lose


class Node:
    """An agent in a process of its own."""

    def __init__(self, prefix: list[str], values: dict) -> None:
        command = [*prefix, sys.executable, str(HERE / "node.py"), json.dumps(values)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def end(self, within: float = PATIENCE) -> tuple[int, str, str]:
        """Its exit code, what it printed, and its messages."""
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, out, err

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """start(kind, node, of=2, nproc=1, port=...): an agent whose workers do what worker.py calls `kind`."""
    nodes = []

    def start_node(
        kind: str, node: int = 0, of: int = 2, nproc: int = 1, port: int = 0, addr: str = "127.0.0.1", **more: object
    ) -> Node:
        secret = more.pop("secret", SECRET)
        launch_config = {
            **{"nproc": nproc, "nnodes": of, "node_rank": node},
            **{"master_addr": addr, "master_port": port, "secret": secret},
        }
        prefix = more.pop("prefix", [])
        values = {
            "argv": [kind, str(tmp_path)],
            "launch_config": launch_config,
            "timeout": PATIENCE,
            "step_timeout": 0,
            **more,
        }
        nodes.append(Node(prefix, values))
        return nodes[-1]

    yield start_node
    for node in nodes:
        if node.process.poll() is None:
            node.process.kill()
            node.process.communicate()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def await_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def pid_of(folder: Path, rank: int, attempt: int = 0) -> int:
    await_file(folder / f"ready-{rank}-{attempt}")
    return int((folder / f"pid-{rank}-{attempt}").read_text())


def await_end_of(pid: int, within: float) -> None:
    deadline = time.monotonic() + within
    while Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def await_handler_of(pid: int, number: int) -> None:
    """Until a process catches a signal."""
    deadline = time.monotonic() + PATIENCE
    while not int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1:
        assert time.monotonic() < deadline, f"process {pid} does not catch {number}"
        time.sleep(0.02)


def message(err: str) -> str:
    """The one line that starts with our name."""
    lines = [line for line in err.splitlines() if line.startswith("fm9g: ")]
    assert len(lines) == 1, err
    return lines[0].removeprefix("fm9g: ")


def test_nodes_run_together_and_node_0_shows_the_log(start, port, tmp_path):
    nodes = [start("late", node, nproc=2, port=port, log_dir=str(tmp_path / "log")) for node in (1, 0)][::-1]
    assert nodes[0].end() == (0, "rank 0 done, attempt 0, resumes: False\n", "")
    code, printed, messages = nodes[1].end()
    assert (code, printed) == (0, "")
    assert messages.startswith(f"node 1 of 2 has joined. Node 0 ({socket.gethostname()}) shows the log; ")
    assert f"{tmp_path / 'log'}/rank-2.log" in messages
    assert "rank 3 done" in (tmp_path / "log" / "rank-3.log").read_text()


def test_a_killed_worker_ends_all_nodes_with_one_message(start, port, tmp_path):
    nodes = [start("train", node, nproc=2, port=port, timeout=TIMEOUT) for node in (0, 1)]
    pids = [pid_of(tmp_path, rank) for rank in range(4)]
    os.kill(pids[3], signal.SIGKILL)
    began = time.monotonic()
    for code, out, err in (node.end() for node in nodes):
        assert (code, out) == (1, "")
        assert message(err).startswith(f"rank 3 on host {socket.gethostname()} (node 1): killed by SIGKILL")
    assert time.monotonic() - began < TIMEOUT + SLACK
    for pid in pids:
        await_end_of(pid, 0.1)


def test_a_killed_agent_takes_its_workers_with_it_and_is_missed(start, port, tmp_path):
    nodes = [start("train", node, port=port, timeout=TIMEOUT) for node in (0, 1)]
    pids = [pid_of(tmp_path, rank) for rank in range(2)]
    nodes[1].signal(signal.SIGKILL)
    began = time.monotonic()
    await_end_of(pids[1], SLACK)
    code, _, err = nodes[0].end()
    assert code == 1
    assert f"rank 1 on host {socket.gethostname()} (node 1): no heartbeat" in message(err)
    assert time.monotonic() - began < TIMEOUT + SLACK
    await_end_of(pids[0], 0.1)


def test_a_killed_master_ends_the_other_nodes(start, port, tmp_path):
    nodes = [start("train", node, port=port, timeout=TIMEOUT) for node in (0, 1)]
    pids = [pid_of(tmp_path, rank) for rank in range(2)]
    nodes[0].signal(signal.SIGKILL)
    code, _, err = nodes[1].end(TIMEOUT + SLACK)
    assert code == 1
    assert f"lost the connection to the master 127.0.0.1:{port}" in message(err)
    for pid in pids:
        await_end_of(pid, SLACK)


@pytest.mark.slow
def test_a_stopped_worker_is_missed(start, port, tmp_path):
    nodes = [start("train", node, port=port, timeout=TIMEOUT) for node in (0, 1)]
    pid = pid_of(tmp_path, 1)
    pid_of(tmp_path, 0)
    time.sleep(0.5)
    os.kill(pid, signal.SIGSTOP)
    for code, _, err in (node.end(TIMEOUT + SLACK) for node in nodes):
        assert code == 1
        assert "rank 1 on host" in message(err)
        assert "no heartbeat" in message(err)
    await_end_of(pid, 0.1)


def test_a_missing_node_is_numbered(start, port):
    nodes = [start("train", node, of=3, port=port, timeout=2) for node in (0, 1)]
    for code, _, err in (node.end() for node in nodes):
        assert code == 1
        assert "of 3 nodes, number 2 did not appear within 2 s" in message(err)


@pytest.mark.parametrize(
    ("addr", "problem"), [("127.0.0.1", "refused; is node 0 started"), ("no-such-host.invalid", "does not resolve")]
)
def test_an_unreachable_master(start, port, addr: str, problem: str):
    code, _, err = start("train", 1, port=port, addr=addr, timeout=1.5).end()
    assert code == 2
    assert problem in message(err)
    assert addr in message(err)


def test_a_master_that_is_something_else(start):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        code, _, err = start("train", 1, port=silent.getsockname()[1], timeout=1.5).end()
    assert code == 2
    assert "is not fm9g" in message(err)


def test_a_port_in_use(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = start("train", 0, port=port).end()
    assert code == 2
    assert f"port {port}" in message(err)
    assert "--master-port" in message(err)


@pytest.mark.parametrize(
    ("here", "there", "key"),
    [
        ({"nproc": 1}, {"nproc": 2}, "nproc (GPUS_PER_NODE): 2 there, 1 on node 0"),
        ({"of": 2}, {"of": 3}, "nnodes (NNODES): 3 there, 2 on node 0"),
        ({"fingerprint": {"code": "a"}}, {"fingerprint": {"code": "b"}}, "code: b there, a on node 0"),
    ],
)
def test_nodes_that_were_started_differently(start, port, here: dict, there: dict, key: str):
    nodes = [start("train", 0, port=port, **here), start("train", 1, port=port, **there)]
    for code, _, err in (node.end() for node in nodes):
        assert code == 2
        assert message(err).startswith(f"node 1 on host {socket.gethostname()}: differs from node 0")
        assert key in message(err)


@pytest.mark.slow
def test_a_node_number_given_twice(start, port):
    nodes = [start("train", node, of=3, port=port) for node in (0, 1, 1)]
    for code, _, err in (node.end() for node in nodes):
        assert code == 2
        assert message(err).startswith("node 1 on host")
        assert "given twice" in message(err)


def test_a_stray_node_does_not_end_a_run(start, port, tmp_path):
    nodes = [start("train", node, port=port) for node in (0, 1)]
    pid_of(tmp_path, 0), pid_of(tmp_path, 1)
    code, _, err = start("train", 1, port=port).end()
    assert code == 2
    assert "given twice" in message(err)
    time.sleep(2)
    assert [node.process.poll() for node in nodes] == [None, None]


def test_a_users_mistake_in_one_rank_is_told_once_a_node_and_not_tried_again(start, port):
    nodes = [start("error", node, port=port, max_restarts=3) for node in (0, 1)]
    for code, out, err in (node.end() for node in nodes):
        assert (code, out) == (2, "")
        assert err.strip() == (
            f"fm9g: rank 1 on host {socket.gethostname()} (node 1): data.jsonl:7: found nothing, expected something"
        )


def test_a_bug_comes_with_its_traceback(start):
    code, _, err = start("bug", of=1, nproc=2).end()
    assert code == 1
    assert "(node 0): KeyError: 'a bug'" in message(err)
    assert "worker.py" in err


def test_a_worker_that_ends_without_a_word_has_its_last_line_shown(start):
    code, _, err = start("exit", of=1, nproc=2).end()
    assert code == 1
    assert message(err).endswith("ended with exit code 3: the last words")


def test_ranks_that_differ_name_the_one_that_does(start):
    code, _, err = start("differ", of=1, nproc=2).end()
    assert code == 2
    assert message(err).startswith("rank 1 on host right (node 0): differs from rank 0 on host left in data.hash: bb")


def test_the_echo_of_a_death_is_not_the_cause(start, port, tmp_path):
    nodes = [start("echo", node, port=port, timeout=TIMEOUT) for node in (0, 1)]
    pid_of(tmp_path, 0)
    pid = pid_of(tmp_path, 1)
    (tmp_path / "killed").touch()  # the echo comes before anyone else knows
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    for _, _, err in (node.end() for node in nodes):
        assert "rank 1" in message(err)
        assert "SIGKILL" in message(err)


def test_a_step_that_hangs_is_reported_with_the_stacks_of_all_ranks(start, port, tmp_path):
    nodes = [start("hang", node, port=port, step_timeout=3.0) for node in (0, 1)]
    ends = [node.end() for node in nodes]
    (stacks,) = tmp_path.glob("stacks-*.txt")
    for code, _, err in ends:
        assert code == 1
        assert "step 4 hangs" in message(err)
        assert str(stacks) in message(err)
    assert "== rank 0" in stacks.read_text()
    assert "hang_here" in stacks.read_text().split("== rank 1")[1]
    assert "hang_here" in ends[0][2]  # on the screen of node 0 too


def test_all_nodes_start_again_after_a_crash(start, port):
    nodes = [start("crash-once", node, port=port, max_restarts=2) for node in (0, 1)]
    ends = [node.end() for node in nodes]
    assert [end[0] for end in ends] == [0, 0]
    assert "rank 0 done, attempt 1, resumes: True" in ends[0][1]
    for _, _, err in ends:
        assert "rank 1" in err
        assert "warning: starting again (1 of 2)" in err
        assert "(2 of 2)" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_workers_save(start, tmp_path, number: int):
    node = start("train", of=1, nproc=2)
    pid_of(tmp_path, 0), pid_of(tmp_path, 1)
    time.sleep(0.3)
    os.killpg(node.process.pid, number)  # as a terminal does
    code, _, err = node.end()
    assert code == 130
    assert err.count("stopping with a checkpoint") == 1  # from the agent, and not from the terminal too
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_second_signal_ends_at_once_what_does_not_listen(start, tmp_path):
    node = start("train", of=1, nproc=2, timeout=10 * PATIENCE)
    pids = [pid_of(tmp_path, 0), pid_of(tmp_path, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.3)
    node.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert node.process.poll() is None
    node.signal(signal.SIGTERM)
    code, _, err = node.end(PATIENCE / 2)  # not after `grace_period`, which is as long again
    assert code == 130
    assert "second signal" in message(err)
    for pid in pids:
        await_end_of(pid, 0.1)


@pytest.mark.slow
def test_a_signal_while_nodes_are_missing(start, port):
    node = start("train", 0, port=port)
    await_handler_of(node.process.pid, signal.SIGHUP)
    node.signal(signal.SIGINT)
    code, _, err = node.end(PATIENCE / 2)
    assert code == 130
    assert "interrupted by SIGINT" in message(err)


def attack(addr: str, *ports: int, prefix: Sequence[str] = ()) -> None:
    command = [*prefix, sys.executable, str(HERE / "attacker.py"), addr, *map(str, ports)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=2 * PATIENCE)
    assert done.stdout.count("False") == len(ports), done


def end_well(nodes: list[Node]) -> None:
    """Ends runs that go on, which save as always."""
    time.sleep(2)
    assert [node.process.poll() for node in nodes] == [None] * len(nodes)
    nodes[0].signal(signal.SIGTERM)
    nodes[-1].signal(signal.SIGTERM)
    assert [node.end()[0] for node in nodes] == [130] * len(nodes)


@pytest.mark.slow
def test_strangers_do_nothing_to_a_run(start, port, tmp_path):
    nodes = [start("train", node, port=port) for node in (0, 1)]
    pid_of(tmp_path, 0), pid_of(tmp_path, 1)
    attack("127.0.0.1", port)
    end_well(nodes)


@pytest.mark.slow
def test_a_node_with_another_secret_is_told_so_and_ends_nobody(start, port, tmp_path):
    nodes = [start("train", node, port=port) for node in (0, 1)]
    pid_of(tmp_path, 0), pid_of(tmp_path, 1)
    code, _, err = start("train", 1, port=port, timeout=1.5, secret="the secret of another run").end()
    assert code == 2
    assert "give FM9G_SECRET the same value on all machines of the run" in message(err)
    end_well(nodes)


def test_one_machine_listens_to_itself_alone(start, tmp_path):
    """And makes a secret for its processes."""
    node = start("train", of=1, nproc=2, secret="")
    environ = Path(f"/proc/{pid_of(tmp_path, 1)}/environ").read_bytes().split(b"\0")
    (port,) = [int(line.partition(b"=")[2]) for line in environ if line.startswith(b"MASTER_PORT=")]
    assert len([line for line in environ if re.fullmatch(rb"FM9G_SECRET=[0-9a-f]{32}", line)]) == 1
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    attack("127.0.0.1", port)
    end_well([node])


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two machines and a cable: network namespaces with the addresses 10.99.0.1 and 10.99.0.2."""
    names = [f"fm9g{os.getpid() % 10000}{side}" for side in "ab"]
    setup = [f"ip netns add {name}" for name in names]
    setup += [f"ip link add {names[0]}0 netns {names[0]} type veth peer name {names[1]}0 netns {names[1]}"]
    for i, name in enumerate(names):
        setup += [f"ip -n {name} addr add 10.99.0.{i + 1}/24 dev {name}0", f"ip -n {name} link set {name}0 up"]
        setup += [f"ip -n {name} link set lo up"]
    try:
        for line in setup:
            try:
                subprocess.run(line.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_strangers_on_the_network_do_nothing_to_two_machines(start, port, tmp_path, namespaces):
    inside = [["ip", "netns", "exec", name] for name in namespaces]
    nodes = [start("train", i, addr="10.99.0.1", port=port, prefix=prefix) for i, prefix in enumerate(inside)]
    pid_of(tmp_path, 0), pid_of(tmp_path, 1)
    attack("10.99.0.1", port, prefix=inside[1])
    end_well(nodes)


def test_a_cut_network_ends_both_sides(start, port, tmp_path, namespaces):
    """The cable is cut: packets vanish, and no connection is reset."""
    nodes = [
        start("train", i, addr="10.99.0.1", port=port, timeout=TIMEOUT, prefix=["ip", "netns", "exec", name])
        for i, name in enumerate(namespaces)
    ]
    pids = [pid_of(tmp_path, rank) for rank in range(2)]
    time.sleep(0.5)
    # Not the device but the path: a device that is down lets the sender know.
    drop = f"tc -n {namespaces[1]} qdisc add dev {namespaces[1]}0 root netem loss 100%"
    if subprocess.run(drop.split(), capture_output=True).returncode:
        subprocess.run(f"ip -n {namespaces[0]} link set {namespaces[0]}0 down".split(), check=True)
    began = time.monotonic()
    ends = [node.end() for node in nodes]
    assert time.monotonic() - began < TIMEOUT + SLACK
    assert [end[0] for end in ends] == [1, 1]
    assert "rank 1 on host" in message(ends[0][2])
    assert "no heartbeat" in message(ends[0][2])
    assert "master 10.99.0.1" in message(ends[1][2])
    for pid in pids:
        await_end_of(pid, 0.1)
