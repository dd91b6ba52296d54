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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from faults.attempts import Attempts, State, clear, differences, is_plain_refusal, is_temporary, state
from faults.commands import COMMANDS, Bed, end
from faults.forked import Ended, Running, session
from train.faults import Bed as TrainBed
from train.faults import Course, Tally, Way

from fm9g.checkpoint.folder import MANIFEST, RUN_CONFIG

PAGE = 4096
STEPS = 6  # of the runs here
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS = 0x20000  # CLONE_NEWNS
_CAPABILITIES = 0x20080522  # version of what capset takes
HOUR = 3600.0


def _settle(bed: Bed, name: str, made: Attempts, ended: Ended, before: State, where: str, words: str = "") -> None:
    """Looks at what a disturbed command left. words: of which a refusal has one, parted by |."""
    after = bed.undisturbed(COMMANDS[name]).after
    left = state(bed.work)
    if ended.others:
        made.complain(f"{where}: {ended.others} processes lived on", ended)
    if ended.code == 0:
        made.meet("done")
        if left != after:
            made.complain(f"{where}: done, but {differences(left, after)}", ended)
    elif is_plain_refusal(ended) and re.search(words, ended.stderr):
        made.meet("refused")
        kept = {path for path in left if ".partial" in path} if "is kept in" in ended.stderr else set()
        # An empty folder may be there for what could not be written.
        found = {path: checksum for path, checksum in left.items() if path not in kept and not path.endswith("/")}
        if found != before:
            made.complain(f"{where}: refused, but {differences(found, before)}", ended)
    else:
        made.meet("ended badly")
        made.complain(f"{where}: ended with {ended.code}, late: {ended.late}", ended)


def _start(bed: Bed, name: str, fresh: bool) -> State:
    """Puts what is there before a command where it runs."""
    undisturbed = bed.undisturbed(COMMANDS[name])
    clear(bed.work, None if fresh else undisturbed.start)
    return {} if fresh else undisturbed.before


# Disks


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory over a folder. options: size=BYTES, nr_inodes=NUMBER."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "fm9g-test", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder, suppress(OSError, subprocess.CalledProcessError):
        with mounted(Path(folder), "size=64k"):
            return True
    return False


def small_disks(bed: Bed, name: str, sizes: int) -> Attempts:
    """A command on disks of so many sizes, from one page more than what is there to what it needs, and on disks with
    as few inodes; then again, with space."""
    made = Attempts(f"{name}: the disk is full")
    for fresh in (True, False):
        _start(bed, name, fresh)
        used, inodes = _used(bed.work)
        undisturbed = bed.undisturbed(COMMANDS[name])
        needs = sum(_pages(size) for size in undisturbed.sizes)
        limits = [f"size={(used + 1 + needs * number // sizes) * PAGE}" for number in range(sizes)] + [
            f"nr_inodes={inodes + 1 + number}" for number in range(sizes // 2)
        ]
        for limit in limits:
            with mounted(bed.work, limit):
                before = _start(bed, name, fresh)
                where = f"{limit}, {'no' if fresh else 'an old'} target"
                ended = bed.run(COMMANDS[name].argv)
                _settle(bed, name, made, ended, before, where, "disk is full|No space left|cannot be written")
                subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=10000", str(bed.work)], check=True)
                end(bed, COMMANDS[name], made, where)
    return made


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


def no_shared_memory(bed: Bed, name: str, number: int) -> Attempts:
    """A command whose workers find /dev/shm full."""
    made = Attempts(f"{name}: /dev/shm is full")
    for fresh in itertools.islice(itertools.cycle((True, False)), number):
        before = _start(bed, name, fresh)
        ended = bed.run(COMMANDS[name].argv, FullSharedMemory())
        _settle(bed, name, made, ended, before, "full", "/dev/shm is full")
    return made


# Users


@dataclass(frozen=True)
class NoPrivileges:
    """Takes from this process what lets root read and write what is not its own."""

    def __call__(self) -> None:
        header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
        if _LIBC.capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError(ctypes.get_errno(), "capset")


def closed_folders(bed: Bed, name: str) -> Attempts:
    """A command whose target's folder, target, or inputs this user may not write, read or enter: one attempt each."""
    made = Attempts(f"{name}: no permission")
    inputs = [bed.inputs / word for word in re.findall(r"\{in\}/(\S+)", COMMANDS[name].argv)]
    for path, mode in [(bed.work, 0o555), (bed.work, 0o000), *((path, 0o000) for path in inputs)]:
        before = _start(bed, name, fresh=False)
        was = path.stat().st_mode
        path.chmod(mode)
        try:
            ended = bed.run(COMMANDS[name].argv, NoPrivileges())
        finally:
            path.chmod(was)
        _settle(bed, name, made, ended, before, f"{path.name} is {mode:03o}", "[Pp]ermission|may not|cannot be")
    return made


# Clocks


@dataclass(frozen=True)
class SteppingClock:
    """Has time.time step back or forth, up to so many seconds, between any two readings."""

    seed: float
    most: float = 26 * HOUR

    def __call__(self) -> None:
        source, whole = random.Random(self.seed), time.time
        time.time = lambda: whole() + source.choice((0.0, source.uniform(-self.most, self.most)))


def stepping_clocks(bed: Bed, name: str, number: int, seed: int) -> Attempts:
    """A command while the clock steps; the files that it finds have times in the past and in the future."""
    made = Attempts(f"{name}: the clock steps")
    source = random.Random(f"{seed} {name}")
    for attempt in range(number):
        before = _start(bed, name, fresh=bool(attempt % 2))
        for path in bed.work.rglob("*"):
            moment = time.time() + source.uniform(-48, 48) * HOUR
            os.utime(path, (moment, moment))
        ended = bed.run(COMMANDS[name].argv, SteppingClock(source.random()))
        _settle(bed, name, made, ended, before, f"attempt {attempt}, seed {seed}")
    return made


# Signals and other processes


def stopped(bed: Bed, name: str, number: int, seed: int) -> Attempts:
    """A command of which a process, itself or a worker, is stopped for a while."""
    made = Attempts(f"{name}: stopped and continued")
    source = random.Random(f"{seed} {name}")
    seconds = bed.undisturbed(COMMANDS[name]).seconds
    for attempt in range(number):
        before = _start(bed, name, fresh=bool(attempt % 2))
        running = bed.start(COMMANDS[name].argv)
        time.sleep(source.uniform(0, seconds))
        victims = session(running.pid)
        if victims:
            victim = source.choice(victims)
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGSTOP)
                time.sleep(source.uniform(0.05, 0.5))
                os.kill(victim, signal.SIGCONT)
        ended = running.wait()
        _settle(bed, name, made, ended, before, f"attempt {attempt}, seed {seed}", "^$")
    return made


def killed_workers(bed: Bed, name: str, number: int, seed: int) -> Attempts:
    """A command one of whose workers is killed, as the system does that is short of memory."""
    made = Attempts(f"{name}: a worker is killed")
    source = random.Random(f"{seed} {name}")
    seconds = bed.undisturbed(COMMANDS[name]).seconds
    for attempt in range(number):
        before = _start(bed, name, fresh=bool(attempt % 2))
        running = bed.start(COMMANDS[name].argv)
        if victims := workers_of(running):
            time.sleep(source.uniform(0, seconds / 2) if attempt else 0)  # the first one is hit as it starts
            with suppress(ProcessLookupError):
                os.kill(source.choice(victims), signal.SIGKILL)
                made.kills += 1
        ended = running.wait()
        where = f"attempt {attempt}, seed {seed}"
        _settle(bed, name, made, ended, before, where, "killed")
        end(bed, COMMANDS[name], made, where)
    return made


def workers_of(running: Running, patience: float = 10.0) -> list[int]:
    """The worker processes of a command, as soon as there is one."""
    deadline = time.monotonic() + patience
    while running.is_alive() and time.monotonic() < deadline:
        if found := [pid for pid in session(running.pid) if pid != running.pid and _is_worker(pid)]:
            return found
        time.sleep(0.005)
    return []


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def two_at_once(bed: Bed, name: str, number: int, seed: int) -> Attempts:
    """The same command twice, the second one begun while the first one runs."""
    made = Attempts(f"{name}: two at once")
    source = random.Random(f"{seed} {name}")
    undisturbed = bed.undisturbed(COMMANDS[name])
    for attempt in range(number):
        _start(bed, name, fresh=bool(attempt % 2))
        first = bed.start(COMMANDS[name].argv)
        time.sleep(source.uniform(0, undisturbed.seconds) * source.random())
        both = [item.wait() for item in (first, bed.start(COMMANDS[name].argv))]
        where = f"attempt {attempt}, seed {seed}"
        made.meet(f"{sum(not ended.code for ended in both)} of 2 done")
        for ended in both:
            if ended.code and not is_plain_refusal(ended):
                made.complain(f"{where}: ended with {ended.code}", ended)
        if all(ended.code for ended in both):
            made.complain(f"{where}: neither was done: {both}")
        elif (found := state(bed.work)) != undisturbed.after:
            made.complain(f"{where}: {differences(found, undisturbed.after)}; {both}")
    return made


# Runs

RUN = (
    "train --config {in}/model.json --dataset_config {in}/mixture.json --tokenizer_path {in}/tokenizer "
    f"--output_dir . --model_unique m --train_iters {STEPS} --save_iters 2 --global_batch 2 --max_length 64 "
    "--warmup_iters 1 --device cpu --dataloader_num_workers 0 --resume auto --async_save false"
)


class Runs:
    """A run in the folder of commands, and what an undisturbed one leaves: the files of its last checkpoint."""

    def __init__(self, bed: Bed, options: str = "") -> None:
        """options: further ones of the command."""
        self.bed, self.halfway, self.command = bed, bed.folder / f"halfway{options}", f"{RUN}{options}"
        clear(bed.work)
        ended = bed.run(f"{self.command} --stop_iters 4")
        assert ended.code == 0, ended
        shutil.copytree(bed.work, self.halfway)
        ended = bed.run(self.command)
        assert ended.code == 0, ended
        self.wanted, self.seconds = self.checkpoint(), ended.seconds

    @property
    def root(self) -> Path:
        return self.bed.work / "checkpoints/m"

    def checkpoint(self) -> State:
        """The files of the last checkpoint that do not say where and how the run was started."""
        found = state(self.root / str(STEPS))
        return {name: checksum for name, checksum in found.items() if name not in (RUN_CONFIG, MANIFEST)}

    def begin(self, halfway: bool) -> None:
        clear(self.bed.work, self.halfway if halfway else None)

    def look(self, made: Attempts, ended: Ended, where: str, words: str = "", killed: bool = False) -> None:
        """Looks at what a disturbed run left, and has it end in peace. words: of a refusal. killed: one of several
        processes was, which is told in words, or cannot be told by the one that was."""
        if ended.others:
            made.complain(f"{where}: {ended.others} processes lived on", ended)
        if ended.code == 0:
            made.meet("done")
        elif killed and ended.code in (1, -signal.SIGKILL) and not ended.late and "Traceback" not in ended.stderr:
            made.meet("told" if ended.code == 1 else "killed")
        elif is_plain_refusal(ended) and re.search(words, ended.stderr):
            made.meet("refused")
        else:
            made.meet("ended badly")
            made.complain(f"{where}: ended with {ended.code}, late: {ended.late}", ended)
        if ended.code:
            ended = self.bed.run(self.command)
        found = self.checkpoint()
        if ended.code or found != self.wanted:
            made.complain(f"{where}: the run after it: {differences(found, self.wanted)}", ended)
        if left := [path for path in state(self.bed.work / "checkpoints") if is_temporary(path)]:
            made.complain(f"{where}: left behind: {left}")


def vanishing_checkpoints(runs: Runs, number: int, seed: int) -> Attempts:
    """A run that goes on from a checkpoint which somebody deletes meanwhile."""
    made = Attempts("train: the checkpoint that it resumes is deleted")
    source = random.Random(seed)
    for attempt in range(number):
        runs.begin(halfway=True)
        running = runs.bed.start(RUN)
        time.sleep(source.uniform(0, runs.seconds))
        shutil.rmtree(runs.root / "4", ignore_errors=True)
        runs.look(made, running.wait(), f"attempt {attempt}, seed {seed}", "4")
    return made


def looks_while_saving(runs: Runs, number: int) -> Attempts:
    """`fm9g ckpt` again and again while a run saves each step and deletes what is old. number: of ckpt commands."""
    made = Attempts("ckpt ls, verify, show, diff: while a run saves")
    commands = itertools.cycle(
        ("ckpt ls {0}", "ckpt verify {0}", "ckpt show {0}/{1} --weights", "ckpt diff {0}/{1} {0}/{1}")
    )
    while made.number < number:
        runs.begin(halfway=False)
        running = runs.bed.start(f"{RUN.replace('save_iters 2', 'save_iters 1')} --save_total_limit 2")
        while running.is_alive() and made.number < number:
            steps = [path.name for path in runs.root.glob("[0-9]*")] or ["1"]
            command = next(commands).format("checkpoints/m", random.choice(steps))
            ended = runs.bed.run(command)
            made.meet("shown" if not ended.code else "nothing there, or no longer")
            if (ended.code and not is_plain_refusal(ended)) or "damaged" in ended.stdout:
                made.complain(command, ended)
        ended = running.wait()
        if ended.code or runs.checkpoint() != runs.wanted:
            made.complain("the run", ended)
    return made


def full_logs(runs: Runs, number: int, seed: int) -> Attempts:
    """A run whose folder of figures is on a disk that others fill and free."""
    made = Attempts("train: the disk of its figures is full")
    source = random.Random(seed)
    logs = runs.bed.work / "logs"
    for attempt in range(number):
        runs.begin(halfway=False)
        logs.mkdir()
        with mounted(logs, "size=40k"), _turbulence(logs, source):
            ended = runs.bed.run(RUN)
            where = f"attempt {attempt}, seed {seed}"
            for file in logs.rglob("*.jsonl"):
                for line in file.read_text().splitlines():
                    if line.count('"step":') > 1:
                        made.complain(f"{where}: two lines in one: {line}")
        runs.look(made, ended, where, "disk is full")
    return made


@contextmanager
def _turbulence(folder: Path, source: random.Random) -> Iterator[None]:
    """Fills a disk but for a few bytes, and frees it, again and again."""
    over = threading.Event()
    ballast = folder / "ballast"

    def fill() -> None:
        while not over.wait(source.uniform(0.005, 0.05)):
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(PAGE)):
                    pass
            over.wait(source.uniform(0.005, 0.05))
            ballast.unlink(missing_ok=True)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def disturbed_runs(
    runs: Runs, what: str, number: int, seed: int, disturb: Callable[[Running, random.Random], bool], words: str
) -> Attempts:
    """Runs with two data workers. disturb: does something to one that has them; returns whether that was a kill. words:
    of a refusal."""
    made = Attempts(f"train: {what}")
    source = random.Random(f"{seed} {what}")
    for attempt in range(number):
        runs.begin(halfway=bool(attempt % 2))
        running = runs.bed.start(RUN.replace("workers 0", "workers 2"))
        made.kills += disturb(running, source)
        runs.look(made, running.wait(), f"attempt {attempt}, seed {seed}", words)
    return made


def kill_worker(running: Running, source: random.Random) -> bool:
    if victims := workers_of(running):
        time.sleep(source.uniform(0, 0.5))
        with suppress(ProcessLookupError):
            os.kill(source.choice(victims), signal.SIGKILL)
            return True
    return False


def stop_any(running: Running, source: random.Random) -> bool:
    """Stops the run, or a worker, for a while."""
    victim = source.choice([*workers_of(running), running.pid])
    time.sleep(source.uniform(0, 0.5))
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGSTOP)
        time.sleep(source.uniform(0.1, 1.0))
        os.kill(victim, signal.SIGCONT)
    return False


def disturbed_launchers(runs: Runs, number: int, seed: int) -> Attempts:
    """Runs of two ranks with their launcher, one of which is stopped for a while, or killed."""
    made = Attempts("train --nproc 2: the launcher or a rank is stopped, or killed")
    source = random.Random(seed)
    for attempt in range(number):
        runs.begin(halfway=True)
        running = runs.bed.start(runs.command)
        time.sleep(source.uniform(0, runs.seconds))
        victims, killed = session(running.pid), bool(attempt % 2)
        if victims:
            with suppress(ProcessLookupError):
                victim = source.choice(victims)
                os.kill(victim, signal.SIGKILL if killed else signal.SIGSTOP)
                made.kills += killed
                time.sleep(source.uniform(0.1, 2.0))
                os.kill(victim, signal.SIGCONT)
        runs.look(made, running.wait(), f"attempt {attempt}, seed {seed}", "^$", killed)
    return made


def stopped_ranks(folder: Path, number: int, seed: int) -> Attempts:
    """Runs of two ranks without a launcher, one of which is stopped for a while."""
    made = Attempts("train, two ranks: a rank is stopped and continued")
    source, tally, way = random.Random(seed), Tally(), Way(ranks=2, background=False)
    bed = TrainBed(folder, steps=STEPS)
    for _ in range(number):
        course = Course(bed, way, "stops", seed, tally, 0, {})
        while not course.over:
            life = course.start(None, "")
            life.sleep(source.uniform(0, bed.reference(2).seconds))
            life.stop(source, source.uniform(0.1, 2.0))
            course.end(life)
        course.close()
        made.meet("done")
    for problem in tally.problems:
        made.complain(problem)
    return made


def runs_without_shared_memory(runs: Runs, number: int) -> Attempts:
    made = Attempts("train: /dev/shm is full")
    for attempt in range(number):
        runs.begin(halfway=bool(attempt % 2))
        running = runs.bed.start(RUN.replace("workers 0", "workers 2"), FullSharedMemory())
        runs.look(made, running.wait(), f"attempt {attempt}", "/dev/shm is full")
    return made


def runs_with_stepping_clocks(runs: Runs, number: int, seed: int) -> Attempts:
    """Also the times of the checkpoints that are there are past and future."""
    made = Attempts("train: the clock steps")
    source = random.Random(seed)
    for attempt in range(number):
        runs.begin(halfway=True)
        for path in runs.root.iterdir():
            moment = time.time() + source.uniform(-48, 48) * HOUR
            os.utime(path, (moment, moment))
        ended = runs.bed.run(RUN, SteppingClock(source.random()))
        runs.look(made, ended, f"attempt {attempt}, seed {seed}")
        events = (runs.bed.work / "logs/m/events.jsonl").read_text().splitlines()
        if [json.loads(event)["kind"] for event in events].count("resume") != 1:
            made.complain(f"attempt {attempt}: {events}")
    return made
