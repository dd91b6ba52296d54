"""`fm9g doctor`: its arguments, and the checks that it runs."""

from __future__ import annotations

import argparse

from fm9g.config.run import RunConfig
from fm9g.convert.run_adapter import with_adapter
from fm9g.doctor.findings import ERROR, OK, Finding, format_findings
from fm9g.doctor.fit import check_memory
from fm9g.doctor.machine import check_machine, check_output_dir, check_rendezvous
from fm9g.doctor.packages import check_packages
from fm9g.errors import UserError
from fm9g.shorthand.load import RunArguments, load_run


def run_checks(
    run: RunConfig | None = None,
    master_addr: str = "",
    master_port: int = 29500,
    node_rank: int = 0,
    nodes: int = 1,
    timeout: float = 5.0,
) -> list[Finding]:
    """Checks this machine, in about ten seconds; minutes if it is very busy.

    Args:
        run: compare memory, disk and processors with its needs; None: check the machine alone.
        master_addr, master_port: address of node 0, to try a connection; empty: none is tried.
        node_rank: number of this machine among `nodes`.
        timeout: seconds to wait for an answer of node 0.
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
    parser.add_argument(
        "--nodes", type=int, default=1, help="number of machines that train together (default: %(default)s)"
    )
    parser.add_argument(
        "--master-addr", default="", help="address of node 0, to which a connection is tried; default: none is tried"
    )
    parser.add_argument("--master-port", type=int, default=29500, help="port of node 0 (default: %(default)s)")
    parser.add_argument(
        "--node-rank", type=int, default=0, help="number of this machine, from 0 (default: %(default)s)"
    )
    parser.epilog = (
        "With FILE, --model or --config, the needs of that run are compared with this machine; --KEY VALUE as for "
        "`fm9g train`."
    )


def run_doctor(options: argparse.Namespace, arguments: RunArguments) -> int:
    """Prints the findings; returns 1 if one is an error. arguments: of a run; empty: check the machine alone."""
    if not 0 < options.master_port < 2**16:
        raise UserError(f"--master-port: found {options.master_port}, expected 1 to 65535")
    if options.nodes < 1:
        raise UserError(f"--nodes: found {options.nodes}, expected at least 1")
    if not 0 <= options.node_rank < options.nodes:
        raise UserError(f"--node-rank: found {options.node_rank}, expected 0 to {options.nodes - 1} (see --nodes)")
    run = with_adapter(load_run(arguments, complete=False, prepare_data=False)) if arguments else None
    findings = run_checks(run, options.master_addr, options.master_port, options.node_rank, options.nodes)
    print(format_findings(findings))
    return int(any(finding.status == ERROR for finding in findings))
