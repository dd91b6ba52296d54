"""Whether a run fits in the memory of this machine, and which changes make it fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm9g.config.load import COMMAND_LINE
from fm9g.config.resolved import DeviceFacts
from fm9g.config.run import RunConfig
from fm9g.doctor.findings import ERROR, OK, WARNING, Finding
from fm9g.errors import UserError
from fm9g.hardware import GIB, GPUS, Gpu
from fm9g.plan.alternatives import memory_saving_options, min_gpus
from fm9g.plan.command import with_global_batch_size
from fm9g.plan.estimate import estimate_job, suggest
from fm9g.plan.job import JobConfig

_PROCESS_OVERHEAD = 0.6  # GiB of a training process on a CPU beside tensors: the interpreter and its libraries
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers: v2, v1


def check_memory(
    run: RunConfig, nodes: int, torch: dict[str, Any], has_bmtrain: bool, total_memory: float | None = None
) -> Finding:
    """Compares the memory that `fm9g plan` estimates for a run with that of this machine.

    Args:
        torch: what torch reports about this machine; see fm9g.doctor.packages.
        total_memory: GiB of host memory; default: that of this machine.
    """
    if not torch:
        return Finding(WARNING, "memory", "not compared: torch could not be asked which GPUs are here", "see its line")
    try:
        if torch["gpus"] and run.train.device != "cpu":
            return _on_gpus(run, nodes, torch["gpus"], DeviceFacts(on_gpu=True, has_bmtrain=has_bmtrain))
        device = DeviceFacts(on_gpu=False, has_fast_bf16=torch["bf16"])
        return _on_cpu(run, nodes, device, bool(torch["gpus"]), total_memory or host_memory())
    except UserError as error:  # a batch that cannot be divided, and the like
        return Finding(ERROR, "memory", "not compared: the configuration cannot run here", str(error))


def cpu_memory_problem(
    run: RunConfig, nodes: int, processes: int, has_gpu: bool | None = None, total_memory: float | None = None
) -> str:
    """Why a run that starts now on CPUs does not fit in memory; empty: it fits, or it has GPUs.

    Args:
        has_gpu: default: whether this machine has an NVIDIA GPU.
        total_memory: GiB of host memory; default: that of this machine.
    """
    if has_gpu is None:
        has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    if run.train.device == "cuda" or has_gpu:
        return ""
    run = run.changed("train", {"n_gpus": processes}, COMMAND_LINE)
    finding = check_memory(run, nodes, {"gpus": [], "bf16": False}, has_bmtrain=False, total_memory=total_memory)
    return finding.detail if finding.status == ERROR else ""


def _on_gpus(run: RunConfig, nodes: int, gpus: list[list[Any]], device: DeviceFacts) -> Finding:
    config, model, size = run.train, run.model, min(gpu[2] for gpu in gpus) / GIB
    processes = min(config.n_gpus, len(gpus))
    keys = f" --n_gpus {processes}" if processes < config.n_gpus else ""
    gpu, job = Gpu(size, GPUS["A100"].flops), JobConfig.from_run(run, nodes, processes, device)
    estimate, count = estimate_job(model, job, gpu), nodes * processes
    found = f"n_gpus is {config.n_gpus}, and torch sees {processes} GPU{'s' * (processes > 1)}; " if keys else ""
    found += (
        f"{_name(run)} takes about {estimate.needed / GIB:.1f} GiB {f'on each of {count} GPUs' if count > 1 else ''}"
    )
    found = f"{found.rstrip()} (as fm9g plan estimates); a GPU here has {size:.1f} GiB"
    if estimate.fits:
        return (
            Finding(ERROR, "memory", found, f"it fits with{keys}")
            if keys
            else Finding(OK, "memory", f"it fits: {found}")
        )
    ways = []
    for changes, other in suggest(model, job, gpu, count=1):
        words = with_global_batch_size(changes, other) if config.global_batch_size else changes
        ways.append(f"{words}{keys}: {other.needed / GIB:.1f} GiB")
    needed = min_gpus(model, job, gpu)
    ways = (ways or memory_saving_options(model, job, gpu, keys)) + (
        [f"as it is, {needed} such GPUs"] if needed else []
    )
    return _does_not_fit(found, ways)


def _on_cpu(run: RunConfig, nodes: int, device: DeviceFacts, has_gpus: bool, total: float) -> Finding:
    """total: GiB of host memory, which the processes share."""
    model, processes = run.model, run.train.n_gpus
    job = JobConfig.from_run(run, nodes, processes, DeviceFacts(on_gpu=True, has_bmtrain=False))
    cpu_job = JobConfig.from_run(run, nodes, processes, device)
    cpu_job = replace(cpu_job, offload_optimizer=False, flash=False)
    estimate = estimate_job(model, cpu_job, Gpu(total / processes, 1.0, _PROCESS_OVERHEAD))
    of = f" in the {processes} processes of n_gpus" if processes > 1 else ""
    found = f"{_name(run)} takes about {processes * estimate.needed / GIB:.1f} GiB{of} (as fm9g plan estimates)"
    found += f"; this machine has {total:.1f} GiB" + (", and device is cpu" if has_gpus else " and no GPU")
    if estimate.fits:
        return Finding(OK, "memory", f"it fits: {found}")
    on_gpus = min_gpus(model, job, GPUS["A100"])
    alone = replace(cpu_job, gpus=1, tp_size=1)
    ways = memory_saving_options(
        model, alone, Gpu(total, 1.0, _PROCESS_OVERHEAD), " --n_gpus 1" if processes > 1 else ""
    )
    ways += [f"as it is, {on_gpus} x A100 of 80 GiB (see fm9g plan)"] if on_gpus else []
    return _does_not_fit(found, ways)


def _does_not_fit(found: str, ways: list[str]) -> Finding:
    return Finding(
        ERROR,
        "memory",
        f"it does not fit: {found}",
        "\n".join(["what would fit:", *ways] if ways else ["take a smaller model"]),
    )


def _name(run: RunConfig) -> str:
    return run.train.model_unique


def host_memory() -> float:
    """GiB of memory of this machine, or of the container that this process runs in."""
    match = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    sizes = [int(match[1]) * 1024] if match else []
    limits = [Path(file).read_text(encoding="utf-8").strip() for file in _CGROUP_LIMITS if Path(file).is_file()]
    return min(sizes + [int(limit) for limit in limits if limit.isdecimal()]) / GIB
