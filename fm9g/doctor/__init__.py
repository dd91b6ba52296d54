"""What `fm9g doctor` looks at: packages, GPUs, this machine's limits, the disk, and the way to node 0."""

from __future__ import annotations

import argparse

from fm9g.config.run import RunConfig
from fm9g.doctor.findings import ERROR, OK, WARNING, Finding, format_findings
from fm9g.doctor.fit import check_memory
from fm9g.doctor.machine import check_machine, check_output_dir, check_rendezvous
from fm9g.doctor.packages import check_packages
from fm9g.errors import UserError

__all__ = ["ERROR", "OK", "WARNING", "Finding", "add_doctor_arguments", "format_findings", "run_checks", "run_doctor"]


def run_checks(
    run: RunConfig | None = None,
    master_addr: str = "",
    master_port: int = 29500,
    node_rank: int = 0,
    nodes: int = 1,
    timeout: float = 5.0,
) -> list[Finding]:
    """Looks at this machine. Takes ten seconds, and minutes where it is very busy.

    run: also compares memory, disk and processors with what it needs. master_addr, master_port: of node 0, tried from
    here as node `node_rank` of `nodes`. timeout: seconds that node 0 has to answer.
    """
    findings, torch = check_packages()
    findings += check_machine(run, len(torch.get("gpus", ())))
    if run:
        findings += check_output_dir(run, nodes)
    if master_addr:
        findings.append(check_rendezvous(master_addr, master_port, node_rank, timeout))
    if run:
        bmtrain = any(finding.name == "bmtrain" and finding.status == OK for finding in findings)
        findings.append(check_memory(run, nodes, torch, bmtrain))
    return findings


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
        from fm9g.convert.merge import with_adapter

        run = with_adapter(run)
    findings = run_checks(run, options.master_addr, options.master_port, options.node_rank, options.nodes)
    print(format_findings(findings))
    return int(any(finding.status == ERROR for finding in findings))
