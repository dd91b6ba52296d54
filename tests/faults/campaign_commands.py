"""Every attempt at breaking commands and runs: `python tests/faults/campaign_commands.py [SECTION ...] [--scale 1]`.

Prints a report; a run of all sections writes it to docs/robustness/commands.md. Exit code 1 where
anything was lost, damaged or left behind. As a user who may mount: without that, nothing is tried that needs it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import reports, system
from faults.attempts import AttemptResults
from faults.commands import COMMANDS, CommandFixture, kill_at_every_change, kill_at_random, kill_quickstart
from faults.disks import can_mount
from helpers.spawn import PRELOADED, context

REPORT = reports.FOLDER / "commands.md"
SLOW = 0.5  # seconds: of a command that takes twice as long, every third change is tried
WORKERS = ("data index, workers",)


class Size:
    """How many attempts there are of each kind."""

    def __init__(self, scale: float, seed: int) -> None:
        self._scale, self.seed = scale, seed

    def __call__(self, number: int) -> int:
        return max(1, round(number * self._scale))

    def stride(self, seconds: float) -> int:
        """How many changes of a file there are from one attempt to the next. seconds: that the command takes."""
        return max(1, round((1 + seconds // SLOW) / self._scale))


def kills(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """SIGKILL before each change of a file"""
    for name, command in COMMANDS.items():
        yield kill_at_every_change(fixture, name, size.stride(fixture.undisturbed(command).seconds))


def moments(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """SIGKILL at random moments"""
    for name in COMMANDS:
        yield kill_at_random(fixture, name, size(20), size.seed)
    yield kill_quickstart(fixture, size(8), size.seed)


def disks(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """Small disks"""
    if can_mount():
        for name in COMMANDS:
            yield system.small_disks(fixture, name, size(6))


def memory(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """A full /dev/shm"""
    if can_mount():
        for name in WORKERS:
            yield system.no_shared_memory(fixture, name, size(4))


def users(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """Folders and files of others"""
    for name in COMMANDS:
        yield system.closed_folders(fixture, name)


def clocks(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """Clocks that step"""
    for name in COMMANDS:
        yield system.stepping_clocks(fixture, name, size(4), size.seed)


def signals(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """SIGSTOP and SIGCONT, and workers that are killed"""
    for name in WORKERS:
        yield system.stopped(fixture, name, size(10), size.seed)
        yield system.killed_workers(fixture, name, size(20), size.seed)


def pairs(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """Two at once for one target"""
    for name in COMMANDS:
        yield system.two_at_once(fixture, name, size(6), size.seed)


def runs(fixture: CommandFixture, size: Size) -> Iterator[AttemptResults]:
    """Training runs"""
    training_runs = system.Runs(fixture)
    yield system.vanishing_checkpoints(training_runs, size(20), size.seed)
    yield system.looks_while_saving(training_runs, size(40))
    yield system.runs_with_stepping_clocks(training_runs, size(10), size.seed)
    yield system.disturbed_runs(
        training_runs, "a data worker is killed", size(20), size.seed, system.kill_worker, "killed"
    )
    yield system.disturbed_runs(training_runs, "it or a worker is stopped", size(10), size.seed, system.stop_any, "^$")
    yield system.disturbed_launchers(system.Runs(fixture, " --nproc 2"), size(10), size.seed)
    yield system.stopped_ranks(fixture.folder / "ranks", size(10), size.seed)
    if can_mount():
        yield system.full_logs(training_runs, size(20), size.seed)
        yield system.runs_without_shared_memory(training_runs, size(6))


SECTIONS: dict[str, Callable[[CommandFixture, Size], Iterator[AttemptResults]]] = {
    section.__name__: section for section in (kills, moments, disks, memory, users, clocks, signals, pairs, runs)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of attempts (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section: {', '.join(unknown)}")
    context.set_forkserver_preload([*PRELOADED, "matplotlib.figure", "fm9g.report.page", "fm9g.data.inspect.check"])
    names = arguments.sections or list(SECTIONS)
    began, found = time.monotonic(), dict[str, list[AttemptResults]]()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        fixture = CommandFixture(Path(folder) / "commands")
        for name in names:
            found[name] = []
            for results in SECTIONS[name](fixture, Size(arguments.scale, arguments.seed)):
                found[name].append(results)
                print("\n".join([" | ".join(map(str, _row(results))), *results.problems]), flush=True)
    command = f"python tests/faults/campaign_commands.py{_options(arguments)}"
    report = _report(command, found, (time.monotonic() - began) / 60)
    print(f"\n{report}")
    if len(names) == len(SECTIONS):
        REPORT.write_text(report, encoding="utf-8")
    return any(results.problems for some in found.values() for results in some)


def _options(arguments: argparse.Namespace) -> str:
    scale = f" --scale {arguments.scale:g}" if arguments.scale != 1 else ""
    return scale + (f" --seed {arguments.seed}" if arguments.seed != 1 else "")


def _row(results: AttemptResults) -> list[object]:
    met = ", ".join(f"{how} {count}" for how, count in sorted(results.outcomes.items()))
    return [results.title, results.count, results.kills, met, len(results.problems)]


def _sums(some: list[AttemptResults]) -> list[object]:
    return [
        sum(results.count for results in some),
        sum(results.kills for results in some),
        sum(len(results.problems) for results in some),
    ]


def _again(section: str, options: str) -> str:
    return f"`python tests/faults/campaign_commands.py {section}{options}`"


def _report(command: str, found: dict[str, list[AttemptResults]], minutes: float) -> str:
    options = command.partition("campaign_commands.py")[2]
    lines = [
        "# Commands and runs that are disturbed",
        "",
        f"`{command}`: {minutes:.0f} minutes.",
        reports.machine(),
        "",
        "After each attempt the target must hold what was there before or what an undisturbed command leaves, byte",
        "for byte. Then the same command must succeed and leave nothing temporary. What it reads must be unchanged, by",
        "its hash; no process may live on; whatever refuses must say so in one message. What is not so counts as lost.",
        "`tests/faults` is the code; a short version is among the tests.",
        "",
        reports.markdown_table(
            ["attempted", "attempts", "kills", "lost", "again"],
            [
                *([SECTIONS[name].__doc__, *_sums(some), _again(name, options)] for name, some in found.items()),
                ["all", *_sums([results for some in found.values() for results in some]), f"`{command}`"],
            ],
        ),
    ]
    for name, some in found.items():
        table = reports.markdown_table(
            ["what", "attempts", "kills", "met", "lost"], [_row(results) for results in some]
        )
        lines += ["", f"## {SECTIONS[name].__doc__}", "", table]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
