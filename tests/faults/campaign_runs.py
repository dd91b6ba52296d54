"""The fault test of checkpoints at length: `python tests/faults/campaign_runs.py --kills 200 --faults 100`.

Prints a report, and writes it to docs/robustness/runs.md. Exit code 1 where anything was not
as in the undisturbed run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import reports
from faults.disks import can_mount
from faults.runs import (
    FAULT_KINDS,
    LAUNCH_MODES,
    FaultStats,
    LaunchMode,
    RunFixture,
    fail_writes_at_random,
    kill_at_random,
)

REPORT = reports.FOLDER / "runs.md"
KILLS: dict[str, Callable[[FaultStats], int]] = {
    "killed": lambda stats: stats.kills,
    "of these while writing": lambda stats: stats.killed_while_saving,
    "before the first step": lambda stats: stats.killed_before_first_step,
    "runs": lambda stats: stats.runs,
    "restarts": lambda stats: stats.restarts,
    "steps lost at most": lambda stats: stats.max_lost_steps,
    "mismatches": lambda stats: len(stats.problems),
}
FAULTS: dict[str, Callable[[FaultStats], int]] = {
    "lives": lambda stats: stats.faulty_launches,
    **{kind: partial(lambda kind, stats: stats.failed_writes[kind], kind) for kind in (*FAULT_KINDS, "delete")},
    "ended with an error": lambda stats: stats.refused_launches,
    "also killed": lambda stats: stats.kills,
    "runs": lambda stats: stats.runs,
    "restarts": lambda stats: stats.restarts,
    "mismatches": lambda stats: len(stats.problems),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs of a run, over all ways to start it")
    parser.add_argument("--faults", type=int, default=100, help="lives of a run whose writes fail, over all ways")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    kinds = FAULT_KINDS if can_mount() else tuple(kind for kind in FAULT_KINDS if kind != "disk")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        fixture = RunFixture(Path(folder))
        killed = _measure(
            arguments.kills, lambda launch_mode, count: kill_at_random(fixture, launch_mode, count, arguments.seed)
        )
        failed = _measure(
            arguments.faults,
            lambda launch_mode, count: fail_writes_at_random(fixture, launch_mode, count, arguments.seed, kinds),
        )
    problems = [problem for stats in (*killed.values(), *failed.values()) for problem in stats.problems]
    command = f"python tests/faults/campaign_runs.py --kills {arguments.kills} --faults {arguments.faults}"
    if arguments.seed != 1:
        command += f" --seed {arguments.seed}"
    minutes = (time.monotonic() - began) / 60
    report = _report(command, fixture, killed, failed, minutes, "disk" in kinds)
    REPORT.write_text(report, encoding="utf-8")
    print(f"\n{report}", *problems, sep="\n")
    return bool(problems)


def _measure(number: int, measure: Callable[[LaunchMode, int], FaultStats]) -> dict[LaunchMode, FaultStats]:
    """An equal part of `number` for each launch mode."""
    found = {}
    for place, launch_mode in enumerate(LAUNCH_MODES):
        count = number // len(LAUNCH_MODES) + (place < number % len(LAUNCH_MODES))
        found[launch_mode] = measure(launch_mode, count)
        print(f"{launch_mode}: {found[launch_mode]}", flush=True)
    return found


def _table(columns: dict[str, Callable[[FaultStats], int]], found: dict[LaunchMode, FaultStats]) -> str:
    everything = FaultStats()
    for stats in found.values():
        everything.add(stats)
    named = [*((str(launch_mode), stats) for launch_mode, stats in found.items()), ("all", everything)]
    return reports.markdown_table(
        ["", *columns], [[name, *(value(stats) for value in columns.values())] for name, stats in named]
    )


def _report(
    command: str,
    fixture: RunFixture,
    killed: dict[LaunchMode, FaultStats],
    failed: dict[LaunchMode, FaultStats],
    minutes: float,
    disk: bool,
) -> str:
    every = fixture.save_iters
    no_disk = "" if disk else " No small disk could be mounted here, so none was filled."
    return f"""# Runs that are killed, and whose writes fail

`{command}`: {minutes:.0f} minutes.
{reports.machine()}

A run is {fixture.steps} steps of a two-layer model with dropout, with a checkpoint every {every} steps, written at once
or beside the training (`async_save`), in one process or two. It is started again with `resume_ckpt auto` until it ends.
After each life every checkpoint has to be whole, and the newest no older than before. At the end the weights, the
optimizer, the data position and the counts of every checkpoint that is kept and the figures of every step have to be,
bit for bit, those of a run that nobody disturbed, and nothing temporary may be left. What was not so is a mismatch.
`tests/faults/runs.py` is the code; a short version is among the tests.

## SIGKILL at a random instant

{_table(KILLS, killed)}

Half of the kills come at any time of a life, the others up to 0.1 s after something temporary appeared among the
checkpoints. "While writing" counts those that left something half written or half deleted. Of two ranks, one is killed
first and the other up to 0.4 s later. A step is lost when it has to be done again; the most that is right is {every}
where checkpoints are written at once and {2 * every} beside.

## Writes that fail

{_table(FAULTS, failed)}

"Lives" are those with failing writes. What follows are checkpoints that could not be written, by the reason. full: no
space; denied: no permission; short: half of a write, then no space. Each of these strikes with a probability of 0.003
to 0.05 whenever something below the run's folder is opened for writing, written, made, replaced or synced, and ten
times that when a checkpoint gets its name, or loses it to be deleted. limit: the kernel cuts a write and refuses the
next at a file size that comes and goes (RLIMIT_FSIZE). disk: a file system of 3 MB that somebody else fills and frees.
delete: an old checkpoint that could not be moved out of the way, for which `tests/faults/test_runs.py` has a test of
its own. A life ends with an error when its last checkpoint, or the probe at its start, cannot be written.{no_disk}
"""


if __name__ == "__main__":
    sys.exit(main())
