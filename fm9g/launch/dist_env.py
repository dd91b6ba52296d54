"""Which process of a run this is, from the environment variables of its launcher."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fm9g.errors import UserError

DEFAULT_TIMEOUT = 60.0  # seconds within which all processes end after a failure
DEFAULT_STEP_TIMEOUT = 1800.0  # seconds that a step may take
DEFAULT_PORT = 29500  # of the master, where several nodes are given without a port
SECRET_VARIABLE = "FM9G_SECRET"
_MIN_SECRET_LENGTH = 16  # characters: an attacker on the network can guess a shorter one


@dataclass(frozen=True)
class RankInfo:
    """The place of this process among those of its run.

    Args:
        launcher: "fm9g" (our agent), "torchrun", "slurm", or "" for a single process.
        attempt: restarts so far.
        start_time: Unix time in seconds when the first attempt started; 0 if unknown.
        timeout: seconds within which all processes end after a failure.
        step_timeout: seconds that a step may take; 0: no limit.
        secret: shared by the processes of the run; empty: whoever reaches the master can interfere.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    nnodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    launcher: str = ""
    attempt: int = 0
    start_time: float = 0.0
    timeout: float = DEFAULT_TIMEOUT
    step_timeout: float = DEFAULT_STEP_TIMEOUT
    secret: str = field(default="", repr=False)

    @property
    def has_agent(self) -> bool:
        """Whether our agent supervises this process and prints why it ended."""
        return self.launcher == "fm9g"

    @property
    def is_single_process(self) -> bool:
        """Whether this process trains alone, without an agent."""
        return self.world_size == 1 and not self.has_agent


@dataclass(frozen=True)
class LaunchConfig:
    """The nodes of a run, as an agent needs them. master_port: 0 takes a free one. secret: see RankInfo."""

    nproc: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    secret: str = field(default="", repr=False)


def detect_launcher(environ: Mapping[str, str] = os.environ) -> str:
    """Returns what started this process: "fm9g", "torchrun", "slurm" (an srun step of several tasks), or ""."""
    if environ.get("FM9G_AGENT"):
        return "fm9g"
    if environ.get("LOCAL_RANK"):
        return "torchrun"
    if environ.get("SLURM_PROCID") and environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):
        return "slurm"
    return ""


def read_dist_env(environ: Mapping[str, str] = os.environ) -> RankInfo:
    """Returns the RankInfo of this process. Raises UserError if variables contradict each other.

    RANK without LOCAL_RANK is ignored: launch scripts export it as the number of the node.
    """
    env = _stripped(environ)
    launcher = detect_launcher(env)
    limits: dict[str, Any] = {
        "timeout": _read_seconds(env, "FM9G_TIMEOUT", DEFAULT_TIMEOUT),
        "step_timeout": _read_seconds(env, "FM9G_STEP_TIMEOUT", DEFAULT_STEP_TIMEOUT),
        "secret": read_secret(env),
    }
    if launcher == "slurm":
        return replace(_slurm_rank_info(env), launcher=launcher, **limits)
    if launcher:
        attempt = _read_int(env, "FM9G_ATTEMPT" if launcher == "fm9g" else "TORCHELASTIC_RESTART_COUNT", default=0)
        start_time = _read_seconds(env, "FM9G_STARTED", 0.0)
        return replace(_torchrun_rank_info(env), launcher=launcher, attempt=attempt, start_time=start_time, **limits)
    if "WORLD_SIZE" in env:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']}, but LOCAL_RANK is not set, so torchrun did not start this process. "
            "Unset WORLD_SIZE for a single process, or start the processes with --nproc"
        )
    return RankInfo(**limits)


def read_launch_config(
    environ: Mapping[str, str] = os.environ,
    nproc: int | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> LaunchConfig:
    """Returns the nodes of a run whose workers an agent starts here.

    Each argument that is None comes from GPUS_PER_NODE, NNODES, RANK (the number of the node), MASTER_ENDPOINT or
    MASTER_ADDR, and MASTER_PORT, else from the variables of an srun step with one task per node.
    Raises UserError that names the option and the variable.
    """
    env = _stripped(environ)
    launcher = detect_launcher(env)
    if launcher in ("fm9g", "torchrun"):
        raise UserError(f"--nproc: {launcher} has started this process as one of several; leave --nproc out")
    slurm = _slurm_rank_info(env) if launcher == "slurm" else None
    if slurm and slurm.local_world_size != 1:
        raise UserError(
            "--nproc: this srun step has several tasks per node; leave --nproc out, or set --ntasks-per-node=1"
        )

    def choose(given: int | None, variable: str, default: int, minimum: int) -> int:
        return _read_int(env, variable, default, minimum) if given is None else given

    processes = choose(nproc, "GPUS_PER_NODE", 1, 1)
    nodes = choose(nnodes, "NNODES", slurm.nnodes if slurm else 1, 1)
    several = slurm if nodes > 1 else None
    node = choose(node_rank, "RANK", several.node_rank if several else -1, 0)
    addr = master_addr or env.get("MASTER_ENDPOINT") or env.get("MASTER_ADDR") or (slurm.master_addr if slurm else "")
    addr = strip_brackets(addr)
    default_port = several.master_port if several else DEFAULT_PORT if nodes > 1 else 0
    port = choose(master_port, "MASTER_PORT", default_port, 0)
    if processes < 1 or nodes < 1:
        raise UserError(f"--nproc {processes}, --nnodes {nodes}: both must be at least 1")
    if nodes > 1 and node < 0:
        raise UserError(f"{nodes} nodes (NNODES or --nnodes), but this one has no number: set RANK or --node-rank")
    if node >= nodes:
        raise UserError(
            f"RANK (--node-rank) is {node}, but there are {nodes} nodes (NNODES or --nnodes), numbered from 0"
        )
    if nodes > 1 and not addr:
        raise UserError(f"{nodes} nodes: set MASTER_ENDPOINT or --master-addr to the name or address of node 0")
    if port > 65535 or (nodes > 1 and port < 1):
        raise UserError(f"MASTER_PORT (--master-port): found {port}, expected 1 to 65535")
    return LaunchConfig(processes, nodes, max(node, 0), addr if nodes > 1 else "127.0.0.1", port, read_secret(env))


def read_secret(environ: Mapping[str, str] = os.environ) -> str:
    """Returns the secret in FM9G_SECRET; empty for none. Raises UserError if it is too short."""
    secret = environ.get(SECRET_VARIABLE, "").strip()
    if 0 < len(secret) < _MIN_SECRET_LENGTH:
        raise UserError(
            f"{SECRET_VARIABLE}: found {len(secret)} characters, expected at least {_MIN_SECRET_LENGTH}; "
            "`fm9g train --print-secret` generates one, for all machines of the run"
        )
    return secret


def generate_secret() -> str:
    """Returns 128 random bits as hexadecimal digits."""
    return secrets.token_hex(16)


def expand_slurm_nodelist(text: str) -> list[str]:
    """Returns the host names in a SLURM node list such as gpu[01-03,07],login1. Raises UserError."""
    names: list[str] = []
    item = r"(?:[^,\[\]\s]|\[[^\[\]\s]*\])+"
    if not re.fullmatch(f"{item}(?:,{item})*", text):
        raise UserError(f"SLURM_STEP_NODELIST: found {text!r}, expected a list of nodes such as gpu[01-03,07],login1")
    for entry in re.findall(item, text):
        parts = re.split(r"\[([^\]]*)\]", entry)  # text and ranges in turn
        expanded = [""]
        for i, part in enumerate(parts):
            expanded = [name + end for name in expanded for end in (_expand_ranges(part) if i % 2 else [part])]
        names += expanded
    return names


def strip_brackets(address: str) -> str:
    """Removes the brackets of an IPv6 address such as [::1]; returns other addresses unchanged."""
    return re.sub(r"^\[(.*)\]$", r"\1", address.strip())


def join_host_port(address: str, port: int) -> str:
    """Formats an address and a port for messages: node0:29500, [::1]:29500."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def host_name() -> str:
    """Returns the name of this machine, as messages show it."""
    return socket.gethostname()


def _stripped(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are not blank, without surrounding spaces."""
    return {name: text.strip() for name, text in environ.items() if text.strip()}


def _expand_ranges(text: str) -> list[str]:
    expanded = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise UserError(f"SLURM_STEP_NODELIST: found the range {part!r}, expected numbers such as 01-03")
        expanded += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return expanded


def _torchrun_rank_info(env: Mapping[str, str]) -> RankInfo:
    """Reads the variables that torchrun and our agent set."""
    world = _read_int(env, "WORLD_SIZE", minimum=1)
    local_world = _read_int(env, "LOCAL_WORLD_SIZE", minimum=1)
    rank, local = _read_int(env, "RANK"), _read_int(env, "LOCAL_RANK")
    _check_below("RANK", rank, "WORLD_SIZE", world)
    _check_below("LOCAL_RANK", local, "LOCAL_WORLD_SIZE", local_world)
    if local_world > world:
        raise UserError(f"LOCAL_WORLD_SIZE is {local_world}, more than WORLD_SIZE, which is {world}")
    nodes = _read_int(env, "GROUP_WORLD_SIZE", -(-world // local_world), 1)
    node = _read_int(env, "GROUP_RANK", rank // local_world)
    if "MASTER_ADDR" not in env:
        raise UserError("LOCAL_RANK is set, but MASTER_ADDR is not; start the processes with torchrun or --nproc")
    addr, port = strip_brackets(env["MASTER_ADDR"]), _read_int(env, "MASTER_PORT", minimum=1)
    return RankInfo(rank, local, world, local_world, node, nodes, addr, port)


def _slurm_rank_info(env: Mapping[str, str]) -> RankInfo:
    """Reads the variables of an srun step."""
    world, rank = _read_int(env, "SLURM_STEP_NUM_TASKS", minimum=1), _read_int(env, "SLURM_PROCID")
    _check_below("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", world)
    hosts = expand_slurm_nodelist(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_LAUNCH_NODE_IPADDR", ""))
    node = _read_int(env, "SLURM_NODEID", 0 if len(hosts) == 1 else None)
    _check_below("SLURM_NODEID", node, "the number of names in SLURM_STEP_NODELIST", len(hosts))
    # 2(x3),1 means 2, 2, 2, 1.
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", str(-(-world // len(hosts))))
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    local_world, local = counts[min(node, len(counts) - 1)], _read_int(env, "SLURM_LOCALID")
    _check_below("SLURM_LOCALID", local, "SLURM_STEP_TASKS_PER_NODE", local_world)
    if "MASTER_PORT" not in env and "SLURM_JOB_ID" not in env:
        raise UserError("SLURM_JOB_ID is not set, so there is no common port to choose: set MASTER_PORT")
    # Below the range of ephemeral ports, and the same for all tasks of an srun step.
    default = 12000 + (_read_int(env, "SLURM_JOB_ID", 0) * 8 + _read_int(env, "SLURM_STEP_ID", 0)) % 20000
    addr, port = strip_brackets(env.get("MASTER_ADDR", hosts[0])), _read_int(env, "MASTER_PORT", default, 1)
    return RankInfo(rank, local, world, local_world, node, len(hosts), addr, port)


def _read_int(env: Mapping[str, str], name: str, default: int | None = None, minimum: int = 0) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name} is not set, but other variables say that this process is one of several")
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < minimum:
        raise UserError(f"{name}: found {text!r}, expected a whole number, at least {minimum}")
    return int(text)


def _read_seconds(env: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(env.get(name, default))
    except ValueError:
        raise UserError(f"{name}: found {env[name]!r}, expected seconds") from None


def _check_below(name: str, value: int, other: str, limit: int) -> None:
    if value >= limit:
        raise UserError(f"{name} is {value}, but {other} is {limit}; numbers begin at 0")
