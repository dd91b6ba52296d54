"""What a system does to commands and runs: small disks, no shared memory, folders of others, clocks that step, signals
that stop, files that vanish, workers that are killed, and a second process for the same target.

Each function makes some attempts and says what they came to. A command that ends with 0 must leave
what an undisturbed one does; one that refuses must say so in one message, and leave what was there before.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from faults.attempts import AttemptResults, State, clear, differences, is_plain_refusal, is_temporary, state
from faults.commands import COMMANDS, CommandFixture, end
from faults.disks import Ballast, mounted
from faults.forked import EndedCommand, RunningCommand, pause_process, session_pids
from faults.prepared import drop_privileges
from faults.runs import FaultStats, LaunchMode, RestartedRun, RunFixture

from fm9g.checkpoint.layout import MANIFEST, RUN_CONFIG

PAGE = 4096
STEPS = 6  # of the runs here
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS = 0x20000  # CLONE_NEWNS
HOUR = 3600.0


def _check_outcome(
    fixture: CommandFixture,
    name: str,
    results: AttemptResults,
    ended: EndedCommand,
    before: State,
    where: str,
    words: str = "",
) -> None:
    """Looks at what a disturbed command left. words: of which a refusal has one, parted by |."""
    after = fixture.undisturbed(COMMANDS[name]).after
    left = state(fixture.work)
    if ended.orphans:
        results.add_problem(f"{where}: {ended.orphans} processes lived on", ended)
    if ended.returncode == 0:
        results.add_outcome("done")
        if left != after:
            results.add_problem(f"{where}: done, but {differences(left, after)}", ended)
    elif is_plain_refusal(ended) and re.search(words, ended.stderr):
        results.add_outcome("refused")
        partials = {path for path in left if ".partial" in path} if "is kept in" in ended.stderr else set()
        # An empty folder may be there for what could not be written.
        found = {path: checksum for path, checksum in left.items() if path not in partials and not path.endswith("/")}
        if found != before:
            results.add_problem(f"{where}: refused, but {differences(found, before)}", ended)
    else:
        results.add_outcome("ended badly")
        results.add_problem(f"{where}: ended with {ended.returncode}, late: {ended.timed_out}", ended)


def _reset_work(fixture: CommandFixture, name: str, fresh: bool) -> State:
    """Puts what is there before a command where it runs."""
    undisturbed = fixture.undisturbed(COMMANDS[name])
    clear(fixture.work, None if fresh else undisturbed.start)
    return {} if fresh else undisturbed.before


# Disks


def small_disks(fixture: CommandFixture, name: str, sizes: int) -> AttemptResults:
    """A command on disks of so many sizes, from one page more than what is there to what it needs, and on disks with
    as few inodes; then again, with space."""
    results = AttemptResults(f"{name}: the disk is full")
    for fresh in (True, False):
        _reset_work(fixture, name, fresh)
        used, inodes = _used(fixture.work)
        undisturbed = fixture.undisturbed(COMMANDS[name])
        needs = sum(_pages(size) for size in undisturbed.sizes)
        limits = [f"size={(used + 1 + needs * number // sizes) * PAGE}" for number in range(sizes)] + [
            f"nr_inodes={inodes + 1 + number}" for number in range(sizes // 2)
        ]
        for limit in limits:
            with mounted(fixture.work, limit):
                before = _reset_work(fixture, name, fresh)
                where = f"{limit}, {'no' if fresh else 'an old'} target"
                ended = fixture.run(COMMANDS[name].argv)
                _check_outcome(
                    fixture, name, results, ended, before, where, "disk is full|No space left|cannot be written"
                )
                subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=10000", str(fixture.work)], check=True)
                end(fixture, COMMANDS[name], results, where)
    return results


def _used(folder: Path) -> tuple[int, int]:
    """Pages and inodes of what is in a folder."""
    paths = list(folder.rglob("*"))
    return sum(_pages(path.stat().st_size) for path in paths if path.is_file()), len(paths) + 1


def _pages(size: int) -> int:
    return -(-size // PAGE)


@dataclass(frozen=True)
class FullSharedMemory:
    """Gives this process, and those that it starts, a /dev/shm that is full."""

    def __call__(self) -> None:
        _new_mounts()
        options = b"size=4096"
        if _LIBC.mount(b"fm9g-test", b"/dev/shm", b"tmpfs", 0, options):
            raise OSError(ctypes.get_errno(), "mount")
        Path("/dev/shm/full").write_bytes(bytes(PAGE))


def _new_mounts() -> None:
    if _LIBC.unshare(_NEW_MOUNTS) or _LIBC.mount(None, b"/", None, 0x44000, None):  # MS_REC | MS_PRIVATE
        raise OSError(ctypes.get_errno(), "unshare")


def no_shared_memory(fixture: CommandFixture, name: str, number: int) -> AttemptResults:
    """A command whose workers find /dev/shm full."""
    results = AttemptResults(f"{name}: /dev/shm is full")
    for fresh in itertools.islice(itertools.cycle((True, False)), number):
        before = _reset_work(fixture, name, fresh)
        ended = fixture.run(COMMANDS[name].argv, FullSharedMemory())
        _check_outcome(fixture, name, results, ended, before, "full", "/dev/shm is full")
    return results


# Users


def closed_folders(fixture: CommandFixture, name: str) -> AttemptResults:
    """A command whose target's folder, target, or inputs this user may not write, read or enter: one attempt each."""
    results = AttemptResults(f"{name}: no permission")
    inputs = [fixture.inputs / word for word in re.findall(r"\{in\}/(\S+)", COMMANDS[name].argv)]
    for path, mode in [(fixture.work, 0o555), (fixture.work, 0o000), *((path, 0o000) for path in inputs)]:
        before = _reset_work(fixture, name, fresh=False)
        was = path.stat().st_mode
        path.chmod(mode)
        try:
            ended = fixture.run(COMMANDS[name].argv, drop_privileges)
        finally:
            path.chmod(was)
        _check_outcome(
            fixture, name, results, ended, before, f"{path.name} is {mode:03o}", "[Pp]ermission|may not|cannot be"
        )
    return results


# Clocks


@dataclass(frozen=True)
class SteppingClock:
    """Has time.time step back or forth, up to so many seconds, between any two readings."""

    seed: float
    most: float = 26 * HOUR

    def __call__(self) -> None:
        rng, real_time = random.Random(self.seed), time.time
        time.time = lambda: real_time() + rng.choice((0.0, rng.uniform(-self.most, self.most)))


def stepping_clocks(fixture: CommandFixture, name: str, number: int, seed: int) -> AttemptResults:
    """A command while the clock steps; the files that it finds have times in the past and in the future."""
    results = AttemptResults(f"{name}: the clock steps")
    rng = random.Random(f"{seed} {name}")
    for attempt in range(number):
        before = _reset_work(fixture, name, fresh=bool(attempt % 2))
        for path in fixture.work.rglob("*"):
            moment = time.time() + rng.uniform(-48, 48) * HOUR
            os.utime(path, (moment, moment))
        ended = fixture.run(COMMANDS[name].argv, SteppingClock(rng.random()))
        _check_outcome(fixture, name, results, ended, before, f"attempt {attempt}, seed {seed}")
    return results


# Signals and other processes


def stopped(fixture: CommandFixture, name: str, number: int, seed: int) -> AttemptResults:
    """A command of which a process, itself or a worker, is stopped for a while."""
    results = AttemptResults(f"{name}: stopped and continued")
    rng = random.Random(f"{seed} {name}")
    seconds = fixture.undisturbed(COMMANDS[name]).seconds
    for attempt in range(number):
        before = _reset_work(fixture, name, fresh=bool(attempt % 2))
        running = fixture.start(COMMANDS[name].argv)
        time.sleep(rng.uniform(0, seconds))
        victims = session_pids(running.pid)
        if victims:
            pause_process(rng.choice(victims), rng.uniform(0.05, 0.5))
        ended = running.wait()
        _check_outcome(fixture, name, results, ended, before, f"attempt {attempt}, seed {seed}", "^$")
    return results


def killed_workers(fixture: CommandFixture, name: str, number: int, seed: int) -> AttemptResults:
    """A command one of whose workers is killed, as the system does that is short of memory."""
    results = AttemptResults(f"{name}: a worker is killed")
    rng = random.Random(f"{seed} {name}")
    seconds = fixture.undisturbed(COMMANDS[name]).seconds
    for attempt in range(number):
        before = _reset_work(fixture, name, fresh=bool(attempt % 2))
        running = fixture.start(COMMANDS[name].argv)
        # The first worker is hit as it starts.
        results.kills += kill_worker(running, rng, seconds / 2 if attempt else 0)
        ended = running.wait()
        where = f"attempt {attempt}, seed {seed}"
        _check_outcome(fixture, name, results, ended, before, where, "killed")
        end(fixture, COMMANDS[name], results, where)
    return results


def workers_of(running: RunningCommand, patience: float = 10.0) -> list[int]:
    """The worker processes of a command, as soon as there is one."""
    deadline = time.monotonic() + patience
    while running.is_alive() and time.monotonic() < deadline:
        if found := [pid for pid in session_pids(running.pid) if pid != running.pid and _is_worker(pid)]:
            return found
        time.sleep(0.005)
    return []


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def two_at_once(fixture: CommandFixture, name: str, number: int, seed: int) -> AttemptResults:
    """The same command twice, the second one begun while the first one runs."""
    results = AttemptResults(f"{name}: two at once")
    rng = random.Random(f"{seed} {name}")
    undisturbed = fixture.undisturbed(COMMANDS[name])
    for attempt in range(number):
        _reset_work(fixture, name, fresh=bool(attempt % 2))
        first = fixture.start(COMMANDS[name].argv)
        time.sleep(rng.uniform(0, undisturbed.seconds) * rng.random())
        both = [item.wait() for item in (first, fixture.start(COMMANDS[name].argv))]
        where = f"attempt {attempt}, seed {seed}"
        results.add_outcome(f"{sum(not ended.returncode for ended in both)} of 2 done")
        for ended in both:
            if ended.returncode and not is_plain_refusal(ended):
                results.add_problem(f"{where}: ended with {ended.returncode}", ended)
        if all(ended.returncode for ended in both):
            results.add_problem(f"{where}: neither was done: {both}")
        elif (found := state(fixture.work)) != undisturbed.after:
            results.add_problem(f"{where}: {differences(found, undisturbed.after)}; {both}")
    return results


# Runs

RUN = (
    "train --config {in}/model.json --dataset_config {in}/mixture.json --tokenizer_path {in}/tokenizer "
    f"--output_dir . --model_unique m --train_iters {STEPS} --save_iters 2 --global_batch_size 2 --max_length 64 "
    "--warmup_iters 1 --device cpu --dataloader_num_workers 0 --resume auto --async_save false"
)


class Runs:
    """A run in the folder of commands, and what an undisturbed one leaves: the files of its last checkpoint."""

    def __init__(self, fixture: CommandFixture, options: str = "") -> None:
        """options: further ones of the command."""
        self.fixture, self.halfway, self.command = fixture, fixture.folder / f"halfway{options}", f"{RUN}{options}"
        clear(fixture.work)
        ended = fixture.run(f"{self.command} --stop_iters 4")
        assert ended.returncode == 0, ended
        shutil.copytree(fixture.work, self.halfway)
        ended = fixture.run(self.command)
        assert ended.returncode == 0, ended
        self.wanted, self.seconds = self.checkpoint(), ended.seconds

    @property
    def root(self) -> Path:
        return self.fixture.work / "checkpoints/m"

    def checkpoint(self) -> State:
        """The files of the last checkpoint that do not say where and how the run was started."""
        found = state(self.root / str(STEPS))
        return {name: checksum for name, checksum in found.items() if name not in (RUN_CONFIG, MANIFEST)}

    def reset(self, halfway: bool) -> None:
        clear(self.fixture.work, self.halfway if halfway else None)

    def check(
        self, results: AttemptResults, ended: EndedCommand, where: str, words: str = "", killed: bool = False
    ) -> None:
        """Looks at what a disturbed run left, and has it end in peace. words: of a refusal. killed: one of several
        processes was, which is told in words, or cannot be told by the one that was."""
        if ended.orphans:
            results.add_problem(f"{where}: {ended.orphans} processes lived on", ended)
        if ended.returncode == 0:
            results.add_outcome("done")
        elif (
            killed
            and ended.returncode in (1, -signal.SIGKILL)
            and not ended.timed_out
            and "Traceback" not in ended.stderr
        ):
            results.add_outcome("told" if ended.returncode == 1 else "killed")
        elif is_plain_refusal(ended) and re.search(words, ended.stderr):
            results.add_outcome("refused")
        else:
            results.add_outcome("ended badly")
            results.add_problem(f"{where}: ended with {ended.returncode}, late: {ended.timed_out}", ended)
        if ended.returncode:
            ended = self.fixture.run(self.command)
        found = self.checkpoint()
        if ended.returncode or found != self.wanted:
            results.add_problem(f"{where}: the run after it: {differences(found, self.wanted)}", ended)
        if left := [path for path in state(self.fixture.work / "checkpoints") if is_temporary(path)]:
            results.add_problem(f"{where}: left behind: {left}")


def vanishing_checkpoints(runs: Runs, number: int, seed: int) -> AttemptResults:
    """A run that goes on from a checkpoint which somebody deletes meanwhile."""
    results = AttemptResults("train: the checkpoint that it resumes is deleted")
    rng = random.Random(seed)
    for attempt in range(number):
        runs.reset(halfway=True)
        running = runs.fixture.start(RUN)
        time.sleep(rng.uniform(0, runs.seconds))
        shutil.rmtree(runs.root / "4", ignore_errors=True)
        runs.check(results, running.wait(), f"attempt {attempt}, seed {seed}", "4")
    return results


def looks_while_saving(runs: Runs, number: int) -> AttemptResults:
    """`fm9g ckpt` again and again while a run saves each step and deletes what is old. number: of ckpt commands."""
    results = AttemptResults("ckpt ls, verify, show, diff: while a run saves")
    commands = itertools.cycle(
        ("ckpt ls {0}", "ckpt verify {0}", "ckpt show {0}/{1} --weights", "ckpt diff {0}/{1} {0}/{1}")
    )
    while results.count < number:
        runs.reset(halfway=False)
        running = runs.fixture.start(f"{RUN.replace('save_iters 2', 'save_iters 1')} --save_total_limit 2")
        while running.is_alive() and results.count < number:
            steps = [path.name for path in runs.root.glob("[0-9]*")] or ["1"]
            command = next(commands).format("checkpoints/m", random.choice(steps))
            ended = runs.fixture.run(command)
            results.add_outcome("shown" if not ended.returncode else "nothing there, or no longer")
            if (ended.returncode and not is_plain_refusal(ended)) or "damaged" in ended.stdout:
                results.add_problem(command, ended)
        ended = running.wait()
        if ended.returncode or runs.checkpoint() != runs.wanted:
            results.add_problem("the run", ended)
    return results


def full_logs(runs: Runs, number: int, seed: int) -> AttemptResults:
    """A run whose folder of figures is on a disk that others fill and free."""
    results = AttemptResults("train: the disk of its figures is full")
    rng = random.Random(seed)
    logs = runs.fixture.work / "logs"
    for attempt in range(number):
        runs.reset(halfway=False)
        logs.mkdir()
        with mounted(logs, "size=40k"), Ballast(logs, rng, pause=(0.005, 0.05), chunk=PAGE):
            ended = runs.fixture.run(RUN)
            where = f"attempt {attempt}, seed {seed}"
            for file in logs.rglob("*.jsonl"):
                for line in file.read_text().splitlines():
                    if line.count('"step":') > 1:
                        results.add_problem(f"{where}: two lines in one: {line}")
        runs.check(results, ended, where, "disk is full")
    return results


def disturbed_runs(
    runs: Runs, what: str, number: int, seed: int, disturb: Callable[[RunningCommand, random.Random], bool], words: str
) -> AttemptResults:
    """Runs with two data workers. disturb: does something to one that has them; returns whether that was a kill. words:
    of a refusal."""
    results = AttemptResults(f"train: {what}")
    rng = random.Random(f"{seed} {what}")
    for attempt in range(number):
        runs.reset(halfway=bool(attempt % 2))
        running = runs.fixture.start(RUN.replace("workers 0", "workers 2"))
        results.kills += disturb(running, rng)
        runs.check(results, running.wait(), f"attempt {attempt}, seed {seed}", words)
    return results


def kill_worker(running: RunningCommand, rng: random.Random, delay: float = 0.5) -> bool:
    """Kills a worker, up to `delay` seconds after it started; returns whether there was one."""
    if victims := workers_of(running):
        time.sleep(rng.uniform(0, delay))
        with suppress(ProcessLookupError):
            os.kill(rng.choice(victims), signal.SIGKILL)
            return True
    return False


def stop_any(running: RunningCommand, rng: random.Random) -> bool:
    """Stops the run, or a worker, for a while."""
    victim = rng.choice([*workers_of(running), running.pid])
    time.sleep(rng.uniform(0, 0.5))
    pause_process(victim, rng.uniform(0.1, 1.0))
    return False


def _kill(pid: int, delay: float) -> None:
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def disturbed_launchers(runs: Runs, number: int, seed: int) -> AttemptResults:
    """Runs of two ranks with their launcher, one of which is stopped for a while, or killed."""
    results = AttemptResults("train --nproc 2: the launcher or a rank is stopped, or killed")
    rng = random.Random(seed)
    for attempt in range(number):
        runs.reset(halfway=True)
        running = runs.fixture.start(runs.command)
        time.sleep(rng.uniform(0, runs.seconds))
        victims, killed = session_pids(running.pid), bool(attempt % 2)
        if victims:
            results.kills += killed
            (_kill if killed else pause_process)(rng.choice(victims), rng.uniform(0.1, 2.0))
        runs.check(results, running.wait(), f"attempt {attempt}, seed {seed}", "^$", killed)
    return results


def stopped_ranks(folder: Path, number: int, seed: int) -> AttemptResults:
    """Runs of two ranks without a launcher, one of which is stopped for a while."""
    results = AttemptResults("train, two ranks: a rank is stopped and continued")
    rng, stats, launch_mode = random.Random(seed), FaultStats(), LaunchMode(ranks=2, async_save=False)
    fixture = RunFixture(folder, steps=STEPS)
    for _ in range(number):
        restarted_run = RestartedRun(fixture, launch_mode, "stops", seed, stats, 0, {})
        while not restarted_run.is_finished:
            launch = restarted_run.start(None, "")
            launch.sleep(rng.uniform(0, fixture.reference(2).seconds))
            launch.pause(rng, rng.uniform(0.1, 2.0))
            restarted_run.end(launch)
        restarted_run.close()
        results.add_outcome("done")
    for problem in stats.problems:
        results.add_problem(problem)
    return results


def runs_without_shared_memory(runs: Runs, number: int) -> AttemptResults:
    results = AttemptResults("train: /dev/shm is full")
    for attempt in range(number):
        runs.reset(halfway=bool(attempt % 2))
        running = runs.fixture.start(RUN.replace("workers 0", "workers 2"), FullSharedMemory())
        runs.check(results, running.wait(), f"attempt {attempt}", "/dev/shm is full")
    return results


def runs_with_stepping_clocks(runs: Runs, number: int, seed: int) -> AttemptResults:
    """Also the times of the checkpoints that are there are past and future."""
    results = AttemptResults("train: the clock steps")
    rng = random.Random(seed)
    for attempt in range(number):
        runs.reset(halfway=True)
        for path in runs.root.iterdir():
            moment = time.time() + rng.uniform(-48, 48) * HOUR
            os.utime(path, (moment, moment))
        ended = runs.fixture.run(RUN, SteppingClock(rng.random()))
        runs.check(results, ended, f"attempt {attempt}, seed {seed}")
        events = (runs.fixture.work / "logs/m/events.jsonl").read_text().splitlines()
        if [json.loads(event)["kind"] for event in events].count("resume") != 1:
            results.add_problem(f"attempt {attempt}: {events}")
    return results
