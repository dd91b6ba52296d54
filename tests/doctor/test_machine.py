"""What `fm9g doctor` finds of limits, disk and network, from facts that are made up."""

import socket
from pathlib import Path

from fm9g.config.run import load_run
from fm9g.doctor.findings import ERROR, OK, WARNING, Finding
from fm9g.doctor.machine import (
    check_disk,
    check_open_files,
    check_output_dir,
    check_processors,
    check_rendezvous,
    check_shared_memory,
)
from fm9g.hardware import GIB


def test_the_way_to_node_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert check_rendezvous("127.0.0.1", port, 1, 1).status == OK
        taken = check_rendezvous("127.0.0.1", port, 0, 1)
        assert (taken.status, "another program" in taken.advice) == (ERROR, True)
    nobody = check_rendezvous("127.0.0.1", port, 1, 1)
    assert (nobody.status, "start node 0" in nobody.advice) == (WARNING, True)
    assert check_rendezvous("127.0.0.1", port, 0, 1).status == OK
    assert check_rendezvous("no-such-host.invalid", port, 1, 1).status == ERROR
    other = check_rendezvous("192.0.2.1", port, 0, 1)  # of TEST-NET: nobody's
    assert (other.status, "not of this machine" in other.advice) == (ERROR, True)


def test_disk_processors_and_output_of_a_run(tmp_path: Path) -> None:
    keys = {"output_dir": str(tmp_path), "train_iters": "1000", "save_iters": "300", "dataloader_num_workers": "999"}
    run = load_run("7b", keys, complete=False)

    def disk(free: float) -> Finding:
        return check_disk(run, int(free * GIB))

    assert "4 checkpoints of 85.7 GiB" in disk(10).detail
    assert [disk(free).status for free in (10, 200, 400)] == [ERROR, WARNING, OK]
    assert "the first 2 fit" in disk(200).advice
    assert "4 processes here (n_gpus) and 3996 to prepare data" in check_processors(run, 64).detail
    assert check_processors(run, 64).status == WARNING
    few = load_run("7b", keys | {"dataloader_num_workers": "1"}, complete=False)
    assert check_processors(few, 64) == Finding(
        OK, "processors", "64; the run starts 4 processes here (n_gpus) and 4 to prepare data"
    )
    for changes, size in (
        ({"optimizer": "adafactor"}, 4),
        ({"optimizer": "adamw8bit", "ema_decay": "0.9"}, 16),
        ({"save_model_only": "1"}, 4),
    ):
        other = load_run("7b", keys | changes, complete=False)
        assert f"checkpoints of {size * 7_668_831_744 / GIB:.1f} GiB" in check_disk(other, GIB).detail
    assert next(check_output_dir(run, nodes=2, file_system="ext4")).status == WARNING
    assert next(check_output_dir(run, nodes=1, file_system="ext4")).status == OK


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = load_run("tiny", {"output_dir": str(tmp_path / "file" / "out")}, complete=False)
    lines = list(check_output_dir(run, nodes=1))
    assert [line.status for line in lines] == [ERROR]


def test_limits() -> None:
    assert check_open_files(1024, -1).advice == "ulimit -n 65536"
    assert check_shared_memory(64 * 2**20, on_gpu=True).status == WARNING
    assert check_shared_memory(64 * 2**20, on_gpu=False).status == OK
    assert check_shared_memory(None, on_gpu=False).status == WARNING
