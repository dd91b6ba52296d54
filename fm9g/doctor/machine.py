"""This machine's limits, its disk, and the way to node 0."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from fm9g.config.run import RunConfig
from fm9g.doctor.findings import ERROR, OK, WARNING, Finding
from fm9g.errors import UserError
from fm9g.hardware import GIB
from fm9g.io.atomic import check_writable
from fm9g.launch.dist_env import join_host_port, strip_brackets
from fm9g.plan.job import JobConfig
from fm9g.plan.sizes import checkpoint_bytes

_SHARED_MEMORY = Path("/dev/shm")
_LOCAL_FILE_SYSTEMS = ("ext4", "xfs", "overlay", "tmpfs", "btrfs")
_UNREACHABLE = "check that node 0 is up, that both are on one network, and that no firewall blocks the port"
_REFUSALS = {
    errno.EADDRINUSE: (ERROR, "another program listens there: end it, or choose another port on all nodes"),
    errno.EADDRNOTAVAIL: (ERROR, "the address is not of this machine: node 0 is the one that it names"),
    errno.EACCES: (ERROR, "ports below 1024 need rights: choose a higher one"),
    errno.ECONNREFUSED: (WARNING, "the machine answers, but nothing listens yet: start node 0, then ask again"),
}


def check_machine(run: RunConfig | None, gpus: int) -> list[Finding]:
    """Checks the limits of this machine, and whether it has enough processors for the run."""
    shared = shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else None
    return [
        check_shared_memory(shared, gpus > 0),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_processors(run, len(os.sched_getaffinity(0))),
    ]


def check_shared_memory(size: int | None, on_gpu: bool) -> Finding:
    """size: of /dev/shm in bytes; None: it does not exist."""
    name = str(_SHARED_MEMORY)
    if size is None:
        return Finding(WARNING, name, "missing", "NCCL and workers share memory there: mount a tmpfs")
    if size < GIB:
        advice = "NCCL and workers share memory there; in a container: --shm-size 16g or --ipc host"
        return Finding(WARNING if on_gpu else OK, name, f"{size / 2**20:.0f} MiB", advice if on_gpu else "")
    return Finding(OK, name, f"{size / GIB:.1f} GiB")


def check_open_files(soft: int, hard: int) -> Finding:
    """The arguments are limits on open files; negative: none."""
    if 0 <= soft < 4096:
        return Finding(WARNING, "open files", f"at most {soft}", f"ulimit -n {65536 if hard < 0 else min(hard, 65536)}")
    return Finding(OK, "open files", f"at most {soft}" if soft >= 0 else "no limit")


def check_processors(run: RunConfig | None, cores: int) -> Finding:
    if run is None:
        return Finding(OK, "processors", str(cores))
    training, workers = run.train.n_gpus, run.train.dataloader_num_workers
    found = f"{cores}; the run starts {training} process{'es' * (training > 1)} here (n_gpus)"
    found += f" and {training * workers} to prepare data"
    if training * (1 + workers) > cores:
        advice = "lower dataloader_num_workers, or the workers slow the training down"
        return Finding(WARNING, "processors", found, advice if training <= cores else "lower n_gpus (or --nproc)")
    return Finding(OK, "processors", found)


def check_output_dir(run: RunConfig, nodes: int, file_system: str | None = None) -> Iterator[Finding]:
    """Checks that the run can write to its output_dir, and how many of its checkpoints fit.

    Args:
        file_system: type of the file system of output_dir, such as ext4; default: that of this machine.
    """
    folder = Path(run.train.output_dir)
    try:
        check_writable(folder)
    except (UserError, OSError) as error:
        yield Finding(ERROR, "output_dir", f"{folder}: {error}", "choose another --output_dir")
        return
    kind = file_system or _file_system(folder)
    if nodes > 1 and kind in _LOCAL_FILE_SYSTEMS:
        advice = "only node 0 writes there; on a shared file system another node could take over"
        yield Finding(WARNING, "output_dir", f"{folder}: writable, {kind}: a local disk", advice)
    else:
        yield Finding(OK, "output_dir", f"{folder}: writable, {kind}")
    yield check_disk(run, shutil.disk_usage(folder).free)


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    kinds = {
        line.split()[1]: line.split()[2]
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    }
    real = folder.resolve()
    return next((kinds[str(parent)] for parent in (real, *real.parents) if str(parent) in kinds), "unknown")


def check_disk(run: RunConfig, free: int) -> Finding:
    """free: bytes on the file system of output_dir."""
    config = run.train
    first_step = int(config.resume_ckpt) if config.resume_ckpt.isdecimal() else 0
    size = checkpoint_bytes(run.model, JobConfig.from_run(run, nodes=1, gpus=config.tp_size))
    steps = range(first_step, config.last_step)
    count = -(-len(steps) // config.interval_steps(config.save_iters)) if config.save else 0
    if config.save_total_limit:  # an old one is deleted once the new one is complete
        count = min(count, config.save_total_limit + 1)
    found = (
        f"{free / GIB:.1f} GiB free; {count} checkpoints of {size / GIB:.1f} GiB to come: {count * size / GIB:.1f} GiB"
    )
    if count and free < size:
        return Finding(ERROR, "disk", found, "not even one fits: free space, or choose another --output_dir")
    if free < count * size:
        return Finding(
            WARNING, "disk", found, f"the first {free // size} fit: raise save_iters, or set save_total_limit"
        )
    return Finding(OK, "disk", found)


def check_rendezvous(address: str, port: int, node_rank: int, timeout: float) -> Finding:
    """Node 0 must be able to listen there, the others to reach it."""
    address = strip_brackets(address)
    name, first_step = f"node 0 at {join_host_port(address, port)}", node_rank == 0
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        return Finding(ERROR, name, f"the name is unknown here: {error}", "check it, or give an IP address")
    with socket.socket(family, kind, protocol) as endpoint:
        endpoint.settimeout(timeout)
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            (endpoint.bind if first_step else endpoint.connect)(target)
        except OSError as error:
            status, advice = _REFUSALS.get(error.errno or 0, (ERROR, _UNREACHABLE))
            return Finding(status, name, f"{target[0]}: {error.strerror or error}", advice)
    return Finding(OK, name, f"{target[0]}: {'this machine can listen there' if first_step else 'answers'}")
