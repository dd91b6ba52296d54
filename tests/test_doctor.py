"""`fm9g doctor`: each finding from a machine that is made up, and the whole on this one."""

import argparse
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm9g.cli import main
from fm9g.config.run import load_run
from fm9g.doctor import add_doctor_arguments, fit, machine, packages, run_checks, run_doctor
from fm9g.doctor.findings import ERROR, GIB, OK, WARNING, Finding, format_findings
from fm9g.doctor.packages import Probe, probe
from fm9g.errors import UserError

HERE = {
    "version": "2.13.0",
    "cuda": "13.0",
    "gpus": [],
    "arch": ["sm_80", "sm_90"],
    "nccl": "2.27.5",
    "gloo": True,
    "abi": True,
}
H100 = ("NVIDIA H100", 79 * GIB, 80 * GIB, 9, 0)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_doctor_arguments(parser)
    return parser.parse_args(words)


def test_a_run_that_does_not_fit_is_known_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_total_memory", lambda: 23.5)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(()))  # no GPU in /dev
    run = load_run("7b", {}, complete=False)
    assert "7b takes about" in fit.cpu_memory_problem(run, nodes=1, processes=2)
    assert fit.cpu_memory_problem(load_run("tiny", {}, complete=False), nodes=1, processes=1) == ""
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / "nvidia0"]))
    assert fit.cpu_memory_problem(run, nodes=1, processes=2) == ""


def test_a_number_of_nodes_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nodes", "0"]) == 2
    assert "--nodes: found 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_is_fit_for_the_tests(tmp_path: Path) -> None:
    run = load_run("tiny", {"output_dir": str(tmp_path / "out"), "train_iters": "10"}, complete=False)
    lines = {line.name: line for line in run_checks(run)}
    for name in ("Python", "torch", "numpy", "transformers", "other packages", "output_dir", "disk", "memory"):
        assert lines[name].status == OK or "slow:" in lines[name].detail, lines[name]
    assert lines["disk"].detail.endswith("1 checkpoints of 0.1 GiB to come: 0.1 GiB")
    assert not list((tmp_path / "out").iterdir())


def test_a_crash_and_a_hang_of_an_import_are_findings() -> None:
    assert "SIGSEGV" in probe("import os; os.kill(os.getpid(), 11)").failure
    assert probe("import time; time.sleep(9)", timeout=0.2).hung
    assert probe("import time; time.sleep(9)", timeout=0.2).failure == "slow: its import was not done after 0 s"
    hung = packages._optional("bitsandbytes", Probe("", "slow: ...", hung=True), HERE)
    assert (hung.status, "try it alone" in hung.advice) == (WARNING, True)
    assert probe("import no_such_thing").failure == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert probe("print(1)") == Probe("1\n")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("ImportError: x.so: undefined symbol: _ZN3c105ErrorC2ENS", "torch 2.13.0, CUDA 13.0, cxx11abiTRUE"),
        ("undefined symbol: ncclBroadcast", "nvidia-nccl-cu11"),
        ("A module that was compiled using NumPy 1.x cannot be run in NumPy 2", "built for numpy 1"),
        ("ImportError: libcudart.so.12: cannot open shared object file", "another CUDA than torch 2.13.0"),
        ("ModuleNotFoundError: No module named 'web'", "pip install web"),
        ("Segmentation fault", "pip uninstall bmtrain"),
    ],
)
def test_what_a_broken_package_says_tells_what_to_do(monkeypatch, text: str, advice: str) -> None:
    monkeypatch.setattr(packages, "_version", lambda name: "1.0.1")
    line = packages._optional("bmtrain", Probe(text, text), HERE | {"gpus": [H100]})
    assert line.status == ERROR
    assert advice in line.advice


def test_what_only_gpus_need_is_not_missed_without_one(monkeypatch) -> None:
    monkeypatch.setattr(packages, "_version", lambda name: "")
    for name in ("bmtrain", "flash-attn", "opendelta", "bitsandbytes"):
        assert packages._optional(name, None, HERE).status == OK
    with_gpu = HERE | {"gpus": [H100]}
    assert packages._optional("bmtrain", None, with_gpu).status == WARNING
    assert "--no-deps" in packages._optional("bmtrain", None, with_gpu).advice
    assert packages._optional("bitsandbytes", None, with_gpu).status == OK


@pytest.mark.parametrize(
    ("torch", "driver", "statuses", "words"),
    [
        ({}, "", [OK], "training runs on the CPU"),
        ({"cuda": None}, "580.95.05", [ERROR], "install torch for CUDA"),
        ({}, "550.54.14", [ERROR], "580.65.06"),
        ({}, "580.95.05", [ERROR], "CUDA_VISIBLE_DEVICES"),
        ({"gpus": [H100]}, "580.95.05", [OK, OK], "80.0 GiB, compute capability 9.0, bf16"),
        (
            {"gpus": [("V100", 32 * GIB, 32 * GIB, 7, 0)], "arch": ["sm_70"]},
            "580.95.05",
            [OK, WARNING],
            "half_type fp16",
        ),
        ({"gpus": [("B200", 1, 1, 10, 0)]}, "580.95.05", [OK, ERROR], "kernels for sm_80, sm_90 only"),
        ({"gpus": [(*H100[:1], 40 * GIB, *H100[2:])]}, "580.95.05", [OK, WARNING], "40.0 GiB in use"),
        ({"gpus": [H100, ("H200", 140 * GIB, 140 * GIB, 9, 0)]}, "580.95.05", [OK, OK, OK, WARNING], "slowest"),
    ],
)
def test_gpus(monkeypatch, torch: dict, driver: str, statuses: list[str], words: str) -> None:
    monkeypatch.setattr(packages, "_driver", lambda: driver)
    lines = list(packages._gpus(HERE | torch))
    assert [line.status for line in lines] == statuses
    assert words in format_findings(lines)


def test_imports_run_a_few_at_a_time_and_a_slow_one_is_no_broken_one(monkeypatch) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def slow(code: str) -> Probe:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.05)
        with lock:
            running -= 1
        return Probe("", "slow: its import was not done after 120 s", hung=True)

    monkeypatch.setattr(packages, "probe", slow)
    monkeypatch.setattr(packages.os, "sched_getaffinity", lambda process: range(2))
    monkeypatch.setattr(packages, "_version", lambda name: "99.1")
    lines, torch = packages.check_packages()
    assert most == 2
    assert packages._TIMEOUT >= 60
    found = {line.name: line for line in lines}
    for name in ("torch", "transformers", "bitsandbytes", "GPU"):
        assert found[name].status == WARNING, found[name]
    assert torch == {}
    assert "CPU" not in found["GPU"].detail  # torch did not say so
    assert "no GPU" not in found["flash-attn"].detail
    assert "not known" in found["NCCL"].detail


CPU_ALONE = HERE | {"bf16": False}


def gpus(count: int, size: int) -> dict:
    return CPU_ALONE | {"gpus": [("NVIDIA", size * GIB, size * GIB, 9, 0)] * count}


@pytest.mark.parametrize(
    ("keys", "torch", "status", "found", "advice"),
    [
        ({"n_gpus": "1"}, CPU_ALONE, ERROR, "this machine has 23.5 GiB and no GPU", "QLoRA on a pretrained model"),
        ({}, CPU_ALONE, ERROR, "in the 4 processes of n_gpus", "nf4 --n_gpus 1: "),
        ({}, CPU_ALONE, ERROR, "it does not fit: 7b takes about ", "as it is, 2 x A100 of 80 GiB"),
        ({}, gpus(4, 80), OK, "it fits: 7b takes about 42.7 GiB on each of 4 GPUs", ""),
        ({}, gpus(2, 80), ERROR, "n_gpus is 4, and torch sees 2 GPUs", "it fits with --n_gpus 2"),
        ({}, gpus(4, 24), ERROR, "a GPU here has 24.0 GiB", "as it is, 16 such GPUs"),
        ({}, gpus(4, 24), ERROR, "does not fit", "--offload_optimizer true"),
        ({"n_gpus": "1"}, gpus(1, 24), ERROR, "does not fit", "LoRA on a pretrained model, --lora_layer"),
        ({"device": "cpu"}, gpus(4, 80), ERROR, "and device is cpu", "QLoRA"),
        ({"global_batch_size": "7"}, gpus(2, 80), ERROR, "cannot run here", "global_batch_size 7"),
        ({}, {}, WARNING, "not compared: torch could not be asked", ""),
    ],
)
def test_memory_of_a_run_is_compared_with_what_is_here(
    monkeypatch, keys: dict, torch: dict, status: str, found: str, advice: str
) -> None:
    monkeypatch.setattr(fit, "_total_memory", lambda: 23.5)
    line = fit.check_memory(load_run("7b", keys, complete=False), 1, torch, has_bmtrain=True)
    assert line.status == status, line
    assert found in line.detail
    assert advice in line.advice
    assert "gradient_accumulation_steps" not in line.advice  # the configuration has global_batch_size


def test_two_nccl_wheels_are_found(monkeypatch) -> None:
    monkeypatch.setattr(
        packages, "_version", lambda name: "2.27.5" if name in ("nvidia-nccl-cu11", "nvidia-nccl-cu13") else ""
    )
    line = packages._nccl(HERE | {"gpus": [H100]})
    assert line.status == ERROR
    assert "--no-deps" in line.advice
    monkeypatch.setattr(packages, "_version", lambda name: "")
    assert packages._nccl(HERE).status == OK


def test_old_and_missing_requirements(monkeypatch) -> None:
    found = {"torch": "2.13.0+cpu", "transformers": "4.40.2", "numpy": ""}
    monkeypatch.setattr(
        packages.metadata, "requires", lambda name: ["torch>=2.6", "transformers>=4.51", "numpy>=2", "x; extra == 'y'"]
    )
    monkeypatch.setattr(packages, "_version", lambda name: found[name])
    lines = {line.name: line for line in packages._requirements({"torch": Probe("{}")}, HERE)}
    assert [lines[name].status for name in found] == [OK, ERROR, ERROR]
    assert lines["transformers"].advice == "pip install 'transformers>=4.51'"


def test_the_way_to_node_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert machine.check_rendezvous("127.0.0.1", port, 1, 1).status == OK
        taken = machine.check_rendezvous("127.0.0.1", port, 0, 1)
        assert (taken.status, "another program" in taken.advice) == (ERROR, True)
    nobody = machine.check_rendezvous("127.0.0.1", port, 1, 1)
    assert (nobody.status, "start node 0" in nobody.advice) == (WARNING, True)
    assert machine.check_rendezvous("127.0.0.1", port, 0, 1).status == OK
    assert machine.check_rendezvous("no-such-host.invalid", port, 1, 1).status == ERROR
    other = machine.check_rendezvous("192.0.2.1", port, 0, 1)  # of TEST-NET: nobody's
    assert (other.status, "not of this machine" in other.advice) == (ERROR, True)


def test_disk_processors_and_output_of_a_run(tmp_path: Path, monkeypatch) -> None:
    keys = {"output_dir": str(tmp_path), "train_iters": "1000", "save_iters": "300", "dataloader_num_workers": "999"}
    run = load_run("7b", keys, complete=False)

    def disk(free: float) -> Finding:
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(free * GIB), total=0))
        return machine._disk(run)

    assert "4 checkpoints of 85.7 GiB" in disk(10).detail
    assert [disk(free).status for free in (10, 200, 400)] == [ERROR, WARNING, OK]
    assert "the first 2 fit" in disk(200).advice
    assert "4 processes here (n_gpus) and 3996 to prepare data" in machine._processors(run).detail
    assert machine._processors(run).status == WARNING
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: range(64))
    few = load_run("7b", keys | {"dataloader_num_workers": "1"}, complete=False)
    assert machine._processors(few) == Finding(
        OK, "processors", "64; the run starts 4 processes here (n_gpus) and 4 to prepare data"
    )
    for changes, size in (
        ({"optimizer": "adafactor"}, 4),
        ({"optimizer": "adamw8bit", "ema_decay": "0.9"}, 16),
        ({"save_model_only": "1"}, 4),
    ):
        other = load_run("7b", keys | changes, complete=False)
        assert f"checkpoints of {size * 7_668_831_744 / GIB:.1f} GiB" in machine._disk(other).detail
    monkeypatch.setattr(machine, "_file_system", lambda folder: "ext4")
    assert next(machine.check_output_dir(run, nodes=2)).status == WARNING
    assert next(machine.check_output_dir(run, nodes=1)).status == OK


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = load_run("tiny", {"output_dir": str(tmp_path / "file" / "out")}, complete=False)
    lines = list(machine.check_output_dir(run, nodes=1))
    assert [line.status for line in lines] == [ERROR]


def test_limits(monkeypatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (1024, -1))
    assert machine._open_files().advice == "ulimit -n 65536"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20))
    assert machine._shared_memory(on_gpu=True).status == WARNING
    assert machine._shared_memory(on_gpu=False).status == OK


def test_the_command(monkeypatch, capsys) -> None:
    lines = [Finding(OK, "Python", "3.11"), Finding(WARNING, "NCCL", "old", "newer")]
    monkeypatch.setattr("fm9g.doctor.run_checks", lambda *arguments: lines)
    assert run_doctor(options(), {}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 errors, 1 warning"
    lines.append(replace(lines[1], status=ERROR))
    assert run_doctor(options(), {}) == 1
    assert "-> newer" in capsys.readouterr().out
    for words, overrides in (((), {"lr": "1"}), (("--master-port", "0"), {}), (("--node-rank", "1"), {})):
        with pytest.raises(UserError):
            run_doctor(options(*words), overrides)
