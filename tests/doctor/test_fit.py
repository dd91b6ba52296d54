"""Whether `fm9g doctor` knows if a run fits, on machines that are made up."""

import pytest

from fm9g.config.run import load_run
from fm9g.doctor.findings import ERROR, OK, WARNING
from fm9g.doctor.fit import check_memory, cpu_memory_problem
from fm9g.hardware import GIB

CPU_ALONE = {"gpus": [], "bf16": False}


def gpus(count: int, size: int) -> dict:
    return CPU_ALONE | {"gpus": [("NVIDIA", size * GIB, size * GIB, 9, 0)] * count}


def test_a_run_that_does_not_fit_is_known_before_it_starts() -> None:
    run, machine = load_run("7b", {}, complete=False), {"total_memory": 23.5, "nodes": 1}
    assert "7b takes about" in cpu_memory_problem(run, processes=2, has_gpu=False, **machine)
    tiny = load_run("tiny", {}, complete=False)
    assert cpu_memory_problem(tiny, processes=1, has_gpu=False, **machine) == ""
    assert cpu_memory_problem(run, processes=2, has_gpu=True, **machine) == ""


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
    keys: dict, torch: dict, status: str, found: str, advice: str
) -> None:
    line = check_memory(load_run("7b", keys, complete=False), 1, torch, has_bmtrain=True, total_memory=23.5)
    assert line.status == status, line
    assert found in line.detail
    assert advice in line.advice
    assert "gradient_accumulation_steps" not in line.advice  # the configuration has global_batch_size
