"""What `fm9g doctor` looks at: packages, GPUs, this machine's limits, the disk, and the way to node 0."""

from __future__ import annotations

import argparse

from fm9g.config.run import RunConfig
from fm9g.doctor.fit import examine_memory
from fm9g.doctor.machine import examine_machine, examine_output, examine_rendezvous
from fm9g.doctor.packages import examine_packages
from fm9g.doctor.report import ERROR, OK, WARNING, Line, show
from fm9g.errors import UserError

__all__ = ["ERROR", "OK", "WARNING", "Line", "add_doctor_arguments", "examine", "run_doctor", "show"]


def examine(
    run: RunConfig | None = None,
    master_addr: str = "",
    master_port: int = 29500,
    node_rank: int = 0,
    nodes: int = 1,
    timeout: float = 5.0,
) -> list[Line]:
    """Looks at this machine. Takes ten seconds, and minutes where it is very busy.

    run: also compares memory, disk and processors with what it needs. master_addr, master_port: of node 0, tried from
    here as node `node_rank` of `nodes`. timeout: seconds that node 0 has to answer.
    """
    lines, torch = examine_packages()
    lines += examine_machine(run, len(torch.get("gpus", ())))
    if run:
        lines += examine_output(run, nodes)
    if master_addr:
        lines.append(examine_rendezvous(master_addr, master_port, node_rank, timeout))
    if run:
        bmtrain = any(line.name == "bmtrain" and line.status == OK for line in lines)
        lines.append(examine_memory(run, nodes, torch, bmtrain))
    return lines


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="", metavar="NAME", help="a run, to compare this machine with its needs")
    parser.add_argument("--nodes", type=int, default=1, help="machines that train together (%(default)s)")
    parser.add_argument("--master-addr", default="", help="node 0, to try the way to it")
    parser.add_argument("--master-port", type=int, default=29500, help="its port (%(default)s)")
    parser.add_argument("--node-rank", type=int, default=0, help="which node this machine is (%(default)s)")
    parser.epilog = "With --config also --KEY VALUE, as for `fm9g train`."


def run_doctor(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Prints the findings; 1 where one is an error. overrides: `--KEY VALUE` for the run that --config names."""
    from fm9g.config.run import load_run

    if overrides and not options.config:
        raise UserError(f"--{next(iter(overrides))}: not an option of doctor; a key of a run goes with --config NAME")
    if not 0 < options.master_port < 2**16:
        raise UserError(f"--master-port: found {options.master_port}, expected 1 to 65535")
    if options.nodes < 1:
        raise UserError(f"--nodes: found {options.nodes}, expected at least 1")
    if not 0 <= options.node_rank < options.nodes:
        raise UserError(f"--node-rank: found {options.node_rank}, expected 0 to {options.nodes - 1} (see --nodes)")
    run = load_run(options.config, overrides, complete=False) if options.config else None
    if run and run.train.value.adapter:
        from fm9g.convert.adapters import with_adapter

        run = with_adapter(run)
    lines = examine(run, options.master_addr, options.master_port, options.node_rank, options.nodes)
    print(show(lines))
    return int(any(line.status == ERROR for line in lines))
