"""Workers without our agent, as under SLURM and torchrun, and a single process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fm9g.launch.kv_store import ConnectionLostError, connect

HERE = Path(__file__).parent
SECRET = "the secret of these runs"
TIMEOUT = 6.0
PLAIN = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM_", "FM9G_"))}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen]]]:
    """start(kind, count): workers that do what worker.py calls `kind`, placed by SLURM's variables."""
    started = []

    def start_tasks(kind: str, count: int = 2, **more: str) -> list[subprocess.Popen]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            start_tasks.port = port = server.getsockname()[1]
        step = {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
        for rank in range(count):
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "FM9G_TIMEOUT": str(TIMEOUT)}
            own |= {"FM9G_SECRET": SECRET, **more}
            started.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "worker.py"), kind, str(tmp_path)],
                    env={**PLAIN, **step, **own},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield start_tasks
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """The exit codes and what was written to stderr."""
    return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=20)]]


def ready(folder: Path, count: int = 2) -> list[int]:
    deadline = time.monotonic() + 30
    while not all((folder / f"ready-{rank}-0").exists() for rank in range(count)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int((folder / f"pid-{rank}-0").read_text()) for rank in range(count)]


def test_ranks_may_end_at_different_times(start):
    assert ends(start("late")) == [(0, ""), (0, "")]  # rank 0, which holds the KV store, is done first


def test_without_a_secret_the_user_is_told_who_may_interfere(start):
    (code, note), (other, nothing) = ends(start("late", FM9G_SECRET=""))
    assert (code, other, nothing) == (0, 0, "")
    assert note.startswith("FM9G_SECRET is not set: anyone with an account on this machine can end this run")


def attack(*ports: int) -> None:
    done = subprocess.run([sys.executable, str(HERE / "attacker.py"), "127.0.0.1", *map(str, ports)], text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert done.stdout.count("False") == len(ports), done


def test_strangers_do_nothing_to_a_run(start, tmp_path):
    tasks = start("train")
    ready(tmp_path)
    attack(start.port)
    time.sleep(2)
    assert [task.poll() for task in tasks] == [None, None]
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    assert [code for code, _ in ends(tasks)] == [130, 130]
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))


def test_a_watching_thread_that_fails_ends_the_run_with_a_message(start, tmp_path):
    tasks = start("train")
    ready(tmp_path)
    kv_client = connect("127.0.0.1", start.port, SECRET, connect_timeout=5.0, request_timeout=5.0)
    with contextlib.suppress(ConnectionLostError):
        while tasks[0].poll() is None:
            kv_client.transact(set={"0/rank/1": 3})
    for code, err in ends(tasks):
        assert code == 1
        assert "Traceback" not in err.splitlines()[0]
    assert "its watchdog thread failed: TypeError" in err or "lost the connection" in err


def test_a_mistake_ends_all_and_is_told_once(start):
    expected = "rank 1 on host"
    (code, err), (other, nothing) = ends(start("error"))
    assert (code, other, nothing) == (2, 2, "")
    assert err.count("fm9g: ") == 1
    assert expected in err
    assert "data.jsonl:7" in err


def test_a_killed_rank_is_missed(start, tmp_path):
    tasks = start("train")
    os.kill(ready(tmp_path)[1], signal.SIGKILL)
    code, err = ends(tasks)[0]
    assert code == 1
    assert "rank 1 on host" in err
    assert "no heartbeat" in err


@pytest.mark.slow
def test_the_echo_of_a_death_waits_for_its_cause(start, tmp_path):
    tasks = start("echo")
    os.kill(ready(tmp_path)[1], signal.SIGKILL)
    (tmp_path / "killed").touch()
    code, err = ends(tasks)[0]
    assert code == 1
    assert "rank 1 on host" in err
    assert "gloo" not in err


def test_the_death_of_rank_0_is_told_by_the_next(start, tmp_path):
    tasks = start("train")
    os.kill(ready(tmp_path)[0], signal.SIGKILL)
    code, err = ends(tasks)[1]
    assert code == 1
    assert "lost the connection to the master 127.0.0.1" in err


@pytest.mark.slow
def test_a_rank_that_never_comes_is_missed(start):
    tasks = start("train")
    tasks[1].kill()
    code, err = ends(tasks)[0]
    assert code == 1
    assert "rank 1 (node 0): no heartbeat since the start" in err


def test_a_process_alone_shows_its_stacks_when_a_step_hangs(tmp_path):
    code = (
        "import time\nfrom fm9g.launch.watchdog import Watchdog\nfrom fm9g.launch.dist_env import RankInfo\n"
        "def stuck(): time.sleep(60)\n"
        "with Watchdog(RankInfo(step_timeout=0.5)) as watchdog:\n"
        "  watchdog.report_progress(6, 'saving'); time.sleep(1.5); print('saved', flush=True)\n"
        "  watchdog.report_progress(7); stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "saved\n")
    assert "in stuck" in done.stderr
    assert "step 8 hangs" in done.stderr


def test_a_process_alone_gets_its_exception_and_needs_no_torch():
    code = (
        "import sys\nfrom fm9g.launch.watchdog import Watchdog\nfrom fm9g.launch.dist_env import RankInfo\n"
        "try:\n  with Watchdog(RankInfo()): raise KeyError('mine')\n"
        "except KeyError: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.mark.slow
def test_torchrun_and_a_collective_operation(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "torch_worker.py"), str(tmp_path)],
        env={**PLAIN, "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["torchrun 0 3"] * 2


def listening(pid: int) -> list[int]:
    """The ports where a process listens to this machine alone. None may be open to others."""
    inodes = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [row for row in (line.split() for table in tables for line in table) if f"socket:[{row[9]}]" in inodes]
    addresses = [row[1].split(":") for row in rows if row[3] == "0A"]
    assert {address for address, _ in addresses} == {"0100007F"}
    return [int(port, 16) for _, port in addresses]


@pytest.mark.slow
def test_strangers_do_nothing_to_a_run_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, str(HERE / "worker.py"), "train", str(tmp_path)], env=PLAIN, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            pids = ready(tmp_path)
            ports = listening(pids[0])  # its KV store has a port of its own, beside that of torchrun's store
            assert len(ports) == 1
            attack(*ports)
            time.sleep(2)
            assert run.poll() is None
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            run.wait(timeout=30)
            assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))
        finally:
            run.kill()
