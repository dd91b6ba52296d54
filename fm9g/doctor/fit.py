"""Whether a run fits the memory that this machine has, and what would."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm9g.config.run import RunConfig
from fm9g.doctor.report import ERROR, GIB, OK, WARNING, Line
from fm9g.errors import UserError
from fm9g.plan.command import in_global_batch
from fm9g.plan.estimate import plan, suggest
from fm9g.plan.lighter import fewest_gpus, lighter
from fm9g.plan.setup import GPUS, Gpu, Setup

_PROCESS = 0.6  # GiB that a process of training takes on a CPU beside tensors: the interpreter and its libraries
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers: v2, v1


def examine_memory(run: RunConfig, nodes: int, torch: dict[str, Any], has_bmtrain: bool) -> Line:
    """What `fm9g plan` says that the run takes, beside what is here. torch: what torch says of this machine."""
    if not torch:
        return Line(WARNING, "memory", "not compared: torch could not be asked which GPUs are here", "see its line")
    try:
        if torch["gpus"] and run.train.value.device != "cpu":
            return _on_gpus(run, nodes, torch["gpus"], "bmtrain" if has_bmtrain else "torch")
        return _on_cpu(run, nodes, torch["bf16"], bool(torch["gpus"]))
    except UserError as error:  # a batch that cannot be dealt out, and the like
        return Line(ERROR, "memory", "not compared: the configuration cannot run here", str(error))


def unfit_on_this_cpu(run: RunConfig, nodes: int, processes: int) -> str:
    """What does not fit, for a run that starts now without a GPU; empty where it fits, or has GPUs."""
    if run.train.value.device == "cuda" or any(Path("/dev").glob("nvidia[0-9]*")):
        return ""
    run = replace(run, train=run.train.changed({"n_gpus": processes}, "command line"))
    line = examine_memory(run, nodes, {"gpus": [], "bf16": False}, has_bmtrain=False)
    return line.found if line.status == ERROR else ""


def _on_gpus(run: RunConfig, nodes: int, gpus: list[list[Any]], engine: str) -> Line:
    config, model, size = run.train.value, run.model.value, min(gpu[2] for gpu in gpus) / GIB
    processes = min(config.n_gpus, len(gpus))
    keys = f" --n_gpus {processes}" if processes < config.n_gpus else ""
    gpu, setup = Gpu(size, GPUS["A100"].flops), Setup.from_run(run, nodes, processes, engine)
    made, count = plan(model, setup, gpu), nodes * processes
    found = f"n_gpus is {config.n_gpus}, and torch sees {processes} GPU{'s' * (processes > 1)}; " if keys else ""
    found += f"{_name(run)} takes about {made.needed / GIB:.1f} GiB {f'on each of {count} GPUs' if count > 1 else ''}"
    found = f"{found.rstrip()} (as fm9g plan estimates); a GPU here has {size:.1f} GiB"
    if made.fits:
        return Line(ERROR, "memory", found, f"it fits with{keys}") if keys else Line(OK, "memory", f"it fits: {found}")
    ways = []
    for changes, other in suggest(model, setup, gpu, count=1):
        words = in_global_batch(changes, other) if config.global_batch else changes
        ways.append(f"{words}{keys}: {other.needed / GIB:.1f} GiB")
    needed = fewest_gpus(model, setup, gpu)
    ways = (ways or lighter(model, setup, gpu, keys)) + ([f"as it is, {needed} such GPUs"] if needed else [])
    return _unfit(found, ways)


def _on_cpu(run: RunConfig, nodes: int, has_bf16: bool, has_gpus: bool) -> Line:
    """The processes of this machine share its memory."""
    model, processes, total = run.model.value, run.train.value.n_gpus, _total_memory()
    setup = Setup.from_run(run, nodes, processes, "torch")
    narrow = has_bf16 and setup.half_type == "bf16"
    here = replace(setup, half_type="bf16" if narrow else "fp32", optimizer_offload=False, flash=False)
    made = plan(model, here, Gpu(total / processes, 1.0, _PROCESS))
    of = f" in the {processes} processes of n_gpus" if processes > 1 else ""
    found = f"{_name(run)} takes about {processes * made.needed / GIB:.1f} GiB{of} (as fm9g plan estimates)"
    found += f"; this machine has {total:.1f} GiB" + (", and device is cpu" if has_gpus else " and no GPU")
    if made.fits:
        return Line(OK, "memory", f"it fits: {found}")
    on_gpus = fewest_gpus(model, setup, GPUS["A100"])
    alone = replace(here, gpus=1, tp_size=1)
    ways = lighter(model, alone, Gpu(total, 1.0, _PROCESS), " --n_gpus 1" if processes > 1 else "")
    ways += [f"as it is, {on_gpus} x A100 of 80 GiB (see fm9g plan)"] if on_gpus else []
    return _unfit(found, ways)


def _unfit(found: str, ways: list[str]) -> Line:
    return Line(
        ERROR,
        "memory",
        f"it does not fit: {found}",
        "\n".join(["what would fit:", *ways] if ways else ["take a smaller model"]),
    )


def _name(run: RunConfig) -> str:
    return run.train.value.model_unique


def _total_memory() -> float:
    """GiB of this machine, or of the container that this is."""
    match = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    sizes = [int(match[1]) * 1024] if match else []
    limits = [Path(file).read_text(encoding="utf-8").strip() for file in _LIMITS if Path(file).is_file()]
    return min(sizes + [int(limit) for limit in limits if limit.isdecimal()]) / GIB
