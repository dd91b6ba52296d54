"""What `fm9g doctor` finds of packages and GPUs, from facts that are made up."""

import threading
import time

import pytest

from fm9g.doctor.findings import ERROR, OK, WARNING, format_findings
from fm9g.doctor.packages import (
    IMPORT_TIMEOUT,
    Probe,
    check_gpus,
    check_nccl,
    check_optional,
    check_packages,
    check_requirements,
    run_probe,
)
from fm9g.hardware import GIB

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


def test_a_crash_and_a_hang_of_an_import_are_findings() -> None:
    assert "SIGSEGV" in run_probe("import os; os.kill(os.getpid(), 11)").failure
    assert run_probe("import time; time.sleep(9)", timeout=0.2).hung
    failure = run_probe("import time; time.sleep(9)", timeout=0.2).failure
    assert failure == "slow: its import was not finished after 0 s"
    hung = check_optional("bitsandbytes", "1.0", Probe("", "slow: ...", hung=True), HERE)
    assert (hung.status, "try it alone" in hung.advice) == (WARNING, True)
    assert run_probe("import no_such_thing").failure == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert run_probe("print(1)") == Probe("1\n")


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
def test_what_a_broken_package_says_tells_what_to_do(text: str, advice: str) -> None:
    line = check_optional("bmtrain", "1.0.1", Probe(text, text), HERE | {"gpus": [H100]})
    assert line.status == ERROR
    assert advice in line.advice


def test_what_only_gpus_need_is_not_missed_without_one() -> None:
    for name in ("bmtrain", "flash-attn", "opendelta", "bitsandbytes"):
        assert check_optional(name, "", None, HERE).status == OK
    with_gpu = HERE | {"gpus": [H100]}
    assert check_optional("bmtrain", "", None, with_gpu).status == WARNING
    assert "--no-deps" in check_optional("bmtrain", "", None, with_gpu).advice
    assert check_optional("bitsandbytes", "", None, with_gpu).status == OK


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
def test_gpus(torch: dict, driver: str, statuses: list[str], words: str) -> None:
    lines = list(check_gpus(HERE | torch, driver))
    assert [line.status for line in lines] == statuses
    assert words in format_findings(lines)


def test_imports_run_a_few_at_a_time_and_a_slow_one_is_no_broken_one() -> None:
    running, max_running = 0, 0
    lock = threading.Lock()

    def slow(code: str) -> Probe:
        nonlocal running, max_running
        with lock:
            running, max_running = running + 1, max(max_running, running + 1)
        time.sleep(0.05)
        with lock:
            running -= 1
        return Probe("", "slow: its import was not finished after 120 s", hung=True)

    names = ("torch", "numpy", "transformers", "bmtrain", "flash-attn", "opendelta", "bitsandbytes")
    lines, torch = check_packages(slow, dict.fromkeys(names, "99.1"), cores=2)
    assert max_running == 2
    assert IMPORT_TIMEOUT >= 60
    found = {line.name: line for line in lines}
    for name in ("torch", "transformers", "bitsandbytes", "GPU"):
        assert found[name].status == WARNING, found[name]
    assert torch == {}
    assert "CPU" not in found["GPU"].detail  # torch did not say so
    assert "no GPU" not in found["flash-attn"].detail
    assert "not known" in found["NCCL"].detail


def test_two_nccl_wheels_are_found() -> None:
    both = {"nvidia-nccl-cu11": "2.27.5", "nvidia-nccl-cu13": "2.27.5"}
    line = check_nccl(HERE | {"gpus": [H100]}, both)
    assert line.status == ERROR
    assert "--no-deps" in line.advice
    assert check_nccl(HERE, {}).status == OK


def test_old_and_missing_requirements() -> None:
    found = {"torch": "2.13.0+cpu", "transformers": "4.40.2", "numpy": ""}
    required = ["torch>=2.6", "transformers>=4.51", "numpy>=2", "x; extra == 'y'"]
    lines = {line.name: line for line in check_requirements(required, found, {"torch": Probe("{}")}, HERE)}
    assert [lines[name].status for name in found] == [OK, ERROR, ERROR]
    assert lines["transformers"].advice == "pip install 'transformers>=4.51'"
