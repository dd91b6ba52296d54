"""Runs that are killed at random and whose writes fail at random, beside one that nobody disturbs.

A course is one run from its first step to its last, in one folder and as many lives as it takes: each life is one or
two processes, which are killed, or end, and the next goes on with `resume_ckpt auto`. After each life every checkpoint
must be whole and the newest no older than before; after the last one everything must be as in the undisturbed run, bit
for bit, and nothing temporary may be left. A seed decides what is done when, but not what the machine does meanwhile.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ranks import context, start_server
from support import index, records, small_model, text, write_jsonl

from fm9g.checkpoint.folder import MANIFEST, RUN_CONFIG, Checkpoint, steps_in
from fm9g.config.run import load_run
from fm9g.data.tokenizer import train_tokenizer
from fm9g.errors import UserError
from fm9g.launch.board import Hub
from fm9g.launch.place import Place
from fm9g.report.files import EVENTS_FILE, METRICS_FILE, read_events
from fm9g.train.run import run_training

ENOUGH = 5  # problems
PATIENCE = 120.0  # seconds that a life may take
KINDS = ("full", "denied", "short", "limit", "disk")  # of failing writes: see WriteFault, and _Disk
WORDS = ("disk is full", "No space left", "Permission denied", "File too large")  # of errors that the faults make
_KEPT_LOGS = {f"{METRICS_FILE}.old", f"{EVENTS_FILE}.old"}  # of a run that began anew under its old name


@dataclass(frozen=True)
class Way:
    """How a run is started. background: it writes checkpoints beside the training."""

    ranks: int
    background: bool

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {'async' if self.background else 'at once'}"


WAYS = tuple(Way(ranks, background) for ranks in (1, 2) for background in (False, True))


@dataclass
class Tally:
    """What was met. writing: kills while a checkpoint was half written or half deleted; building: kills before the
    first step of a life. faulty: lives whose writes failed; refused: those of them that ended with an error which says
    so. lost: most steps that had to be done again after a kill, where writes did not fail. failed: kind -> checkpoints
    that could not be written; "delete": that could not be deleted. problems: what should not be."""

    kills: int = 0
    writing: int = 0
    building: int = 0
    courses: int = 0
    lives: int = 0
    faulty: int = 0
    refused: int = 0
    lost: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        return self.lives - self.courses

    def add(self, other: Tally) -> None:
        for name in ("kills", "writing", "building", "courses", "lives", "faulty", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lost = max(self.lost, other.lost)
        self.failed.update(other.failed)
        self.problems += other.problems


@dataclass(frozen=True)
class Reference:
    """The undisturbed run. seconds: from its start to its end. checkpoints: step -> file -> checksum."""

    seconds: float
    checkpoints: dict[int, dict[str, str]]
    figures: list[dict[str, Any]]


class Bed:
    """Data and a model in a folder, for runs of so many steps, and what an undisturbed one leaves."""

    def __init__(self, folder: Path, steps: int = 14, save_iters: int = 2) -> None:
        self.folder, self.steps, self.save_iters = folder, steps, save_iters
        self._references: dict[int, Reference] = {}
        start_server()
        source = random.Random(0)
        train_tokenizer((text(source, 30) for _ in range(200)), 320, folder / "tokenizer")
        mixture = []
        for name, content in {"few": records(50, 1), "many": records(150, 2)}.items():
            index(write_jsonl(folder / f"{name}.jsonl", content), folder / "indexed" / name, "en")
            mixture.append({"task_name": name, "path": f"indexed/{name}", "abs_weight": 1.0})
        (folder / "mixture.json").write_text(json.dumps(mixture))
        (folder / "model.json").write_text(json.dumps(small_model(dropout=0.1).to_json()))

    def settings(self, out: Path, way: Way, **changes: object) -> dict[str, str]:
        fixed: dict[str, object] = {
            "config": self.folder / "model.json",
            "dataset_config": self.folder / "mixture.json",
            "tokenizer_path": self.folder / "tokenizer",
            "output_dir": out,
            "model_unique": "m",
            "resume_ckpt": "auto",
            "train_iters": self.steps,
            "save_iters": self.save_iters,
            "async_save": way.background,
            "global_batch": 2,
            "max_length": 64,
            "warmup_iters": 2,
            "dataloader_num_workers": 0,
            "device": "cpu",
        }
        return {key: str(value) for key, value in {**fixed, **changes}.items()}

    def any_time(self, source: random.Random, way: Way) -> float:
        """Seconds from the start of a life. Most lives go on from a checkpoint, and are shorter than the first."""
        return source.uniform(0, 0.7 * self.reference(way.ranks).seconds)

    def reference(self, ranks: int) -> Reference:
        if ranks not in self._references:
            out = self.folder / f"undisturbed-{ranks}"
            began = time.monotonic()
            life = Life(self.settings(out, Way(ranks, False)), ranks, out.with_suffix(".log"))
            codes = life.wait()
            assert codes == [0] * ranks, f"the undisturbed run ended with {codes}:\n{life.tail()}"
            root = _root(out)
            made = {step: _checksums(root / str(step)) for step in steps_in(root)}
            self._references[ranks] = Reference(time.monotonic() - began, made, _figures(out))
        return self._references[ranks]


# A life


class Life:
    """The processes of a run, from their start until all have ended."""

    def __init__(
        self, settings: dict[str, str], ranks: int, log: Path, before: Callable[[], object] | None = None
    ) -> None:
        """log: gets what the processes print. before: is called in the first of them, before it trains."""
        self._log, self.late = log, False
        # What an agent does; it outlives the ranks, as an agent.
        self._hub = Hub(0, "", local=True) if ranks > 1 else None
        port = self._hub.port if self._hub else 0
        self._processes = [
            context.Process(target=_live, args=(settings, rank, ranks, port, str(log), None if rank else before))
            for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def goes_on(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def sleep(self, seconds: float) -> None:
        """Returns after so many seconds, or when the life is over."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def kill(self, source: random.Random) -> None:
        """Kills all processes, one after the other, as when the agent finds one dead or the machine is short of memory;
        some time may lie between."""
        for number, process in enumerate(source.sample(self._processes, len(self._processes))):
            if number:
                self.sleep(source.choice((0.0, source.uniform(0, 0.4))))
            process.kill()

    def stop(self, source: random.Random, seconds: float) -> None:
        """Stops one of the processes for so long."""
        pid = source.choice(self._processes).pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)

    def wait(self) -> list[int]:
        """The exit codes, when all have ended; `late` where they had to be killed for that."""
        self.sleep(PATIENCE)
        self.late = self.goes_on()
        for process in self._processes:
            process.kill()
            process.join()
        if self._hub:
            self._hub.close()
        return [process.exitcode or 0 for process in self._processes]

    def tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:]) if self._log.is_file() else ""


def _live(
    settings: dict[str, str], rank: int, ranks: int, port: int, log: str, before: Callable[[], object] | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    place = Place(rank, rank, ranks, ranks, master_port=port, launcher="fm9g", timeout=30) if ranks > 1 else None
    if before:
        before()
    try:
        run_training(load_run(settings["config"], settings), place)
    except UserError as error:
        print(f"UserError: {error}")
        sys.exit(2)


# Courses


def kill_at_random(
    bed: Bed,
    way: Way,
    kills: int,
    seed: int,
    *,
    most: int = 8,
    share_writing: float = 0.5,
    enough: int = ENOUGH,
    before: Callable[[], object] | None = None,
    **changes: object,
) -> Tally:
    """Courses with `kills` kills in all, at most `most` in one.

    share_writing: of the kills that wait until a checkpoint is being written or deleted. enough: problems after which
    no further course begins. before, changes: a call and settings of the disturbed lives, for tests of this test.
    """
    tally = Tally()
    while tally.kills < kills and len(tally.problems) < enough:
        number = tally.courses
        source = random.Random(f"{seed} {way} {number}")
        course = Course(bed, way, "kills", seed, tally, source.choice((0, 2)), changes)
        most_here = min(source.randint(1, most), kills - tally.kills)
        while not course.over:
            life = course.start(before, "")
            if most_here:
                if source.random() < share_writing:
                    course.wait_for_writing(life, source.randint(1, 3))
                    life.sleep(0.1 * source.random() ** 2)
                else:
                    life.sleep(bed.any_time(source, way))
                life.kill(source)
            most_here -= course.end(life)
        course.close()
    return tally


def fail_writes_at_random(
    bed: Bed, way: Way, lives: int, seed: int, kinds: Sequence[str] = KINDS, most: int = 4
) -> Tally:
    """Courses with so many lives whose writes fail, at most `most` in one; some are killed besides.

    kinds: those of KINDS to choose from. A course has one of its own where that is "disk".
    """
    tally = Tally()
    while tally.faulty < lives and len(tally.problems) < ENOUGH:
        source = random.Random(f"faults {seed} {way} {tally.courses}")
        disk_here = source.choice(kinds) == "disk"
        others = ["disk"] if disk_here else [kind for kind in kinds if kind != "disk"]
        limit = 2 if disk_here else source.choice((0, 2))  # more would not fit
        course = Course(bed, way, "faults", seed, tally, limit, {})
        faulty = min(source.randint(1, most), lives - tally.faulty)  # one more life ends the course in peace
        with _small_disk(course.root.parent, source) if disk_here else contextlib.nullcontext() as disk:
            while not course.over:
                kind = source.choice(others) if faulty > 0 else ""
                fault = WriteFault(str(course.root), kind, source.choice((0.003, 0.01, 0.05)), source.random())
                if disk:
                    disk.turbulent = bool(kind)
                back = 0  # a life that goes back writes over what is there; without a limit, which keeps the newest
                if kind and not limit and source.random() < 0.3:
                    back = source.choice([0, *steps_in(course.root)])
                life = course.start(fault.install if kind not in ("", "disk") else None, kind, back)
                if kind and not back and source.random() < 0.4:
                    life.sleep(bed.any_time(source, way))
                    life.kill(source)
                course.end(life)
                faulty -= 1
            course.close()
    return tally


class Course:
    """One run in its folder, life after life; what is met goes into the tally."""

    def __init__(
        self, bed: Bed, way: Way, kind: str, seed: int, tally: Tally, limit: int, changes: dict[str, object]
    ) -> None:
        """limit: checkpoints that are kept, 0 for all. changes: settings."""
        self._bed, self._way, self._course, self._tally = bed, way, f"{kind}, seed {seed}", tally
        self._out = bed.folder / f"{kind}-{seed}-{tally.courses}-{way.ranks}-{way.background:d}"
        self._settings = bed.settings(self._out, way, save_total_limit=limit, **changes)
        self.root, self.over = _root(self._out), False
        self._newest, self._failures, self._before = 0, 0, len(tally.problems)
        bed.reference(way.ranks)
        tally.courses += 1

    def start(self, before: Callable[[], object] | None, kind: str, back: int = 0) -> Life:
        """kind: of writes that fail, or empty. back: the step to go on from; 0: the newest checkpoint."""
        self._tally.lives += 1
        self._tally.faulty += bool(kind)
        self._kind, self._began = kind, time.time()
        settings = {**self._settings, **({"resume_ckpt": str(back)} if back else {})}
        return Life(settings, self._way.ranks, self._out.with_suffix(".log"), before)

    def wait_for_writing(self, life: Life, times: int) -> None:
        """Returns when something temporary has appeared so many times, or the life is over."""
        was = True
        while times and life.goes_on():
            deadline = time.monotonic() + 0.05
            while times and time.monotonic() < deadline:
                now = bool(_temporary(self.root))
                times -= now and not was
                was = now
                time.sleep(0.0003)

    def end(self, life: Life) -> int:
        """Looks at what a life left; returns whether it was killed."""
        codes = life.wait()
        tally, killed = self._tally, -signal.SIGKILL in codes
        events = [event for event in read_events(self._log(EVENTS_FILE)) if (event["time"] or 0) >= self._began]
        if life.late:
            self._complain(f"a life did not end within {PATIENCE:.0f} s:\n{life.tail()}")
        if killed:
            tally.kills += 1
            tally.writing += bool(_temporary(self.root))
            tally.building += not any(event["kind"] in ("start", "resume") for event in events)
        elif not any(codes):
            self.over = True
        elif self._kind and set(codes) == {2}:
            tally.refused += 1
        else:
            self._complain(f"a life ended with {codes}:\n{life.tail()}")
            self._failures += 1
            self.over = self._failures > 2
        for event in events:
            if event["kind"] in ("save_failed", "tidy_failed"):
                tally.failed[self._kind if event["kind"] == "save_failed" else "delete"] += 1
                if not self._kind or not any(words in event["text"] for words in WORDS):
                    self._complain(f"an event that nobody caused: {event}")
        self._look_at_checkpoints(killed)
        if not killed and (left := _temporary(self._out)):
            self._complain(f"a life that ended by itself left {left}")
        return killed

    def _look_at_checkpoints(self, killed: bool) -> None:
        whole = [0]
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder.name.isdecimal():
                try:
                    whole.append(Checkpoint(folder).step)
                except UserError as error:
                    self._complain(f"a damaged checkpoint: {error}")
        if max(whole) < self._newest:
            self._complain(f"the newest checkpoint was that of step {self._newest}, and is that of {max(whole)}")
        self._newest = max(whole)
        if killed and not self._kind:
            lost = max([line["step"] for line in _lines(self._log(METRICS_FILE))] or [0]) - self._newest
            self._tally.lost = max(self._tally.lost, lost)
            # A step is logged before its checkpoint begins; one that is written beside may take until the next.
            if lost > self._bed.save_iters * (1 + self._way.background):
                self._complain(f"{lost} steps were lost")

    def close(self) -> None:
        """Compares the course with the undisturbed run, and deletes its folder where all is well."""
        reference, bed = self._bed.reference(self._way.ranks), self._bed
        steps = steps_in(self.root)
        if not steps or steps[-1] != bed.steps:
            self._complain(f"ended with the checkpoints {steps}")
        for step in steps:
            found, wanted = _checksums(self.root / str(step)), reference.checkpoints[step]
            if odd := sorted(name for name in wanted if found.get(name) != wanted[name]):
                self._complain(f"step {step} is not that of the undisturbed run: {', '.join(odd)}")
        if (figures := _figures(self._out)) != reference.figures:
            odd = [line["step"] for line, other in zip(figures, reference.figures) if line != other]
            self._complain(f"{len(figures)} lines of figures; steps that differ: {odd}")
        if left := _temporary(self._out):
            self._complain(f"left behind: {left}")
        if len(self._tally.problems) == self._before:
            for path in (self._out, self._out.with_suffix(".log")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _log(self, name: str) -> Path:
        return self._out / "logs" / "m" / name

    def _complain(self, problem: str) -> None:
        where = f"{self._way}, {self._course}, course {self._tally.courses}, life {self._tally.lives}"
        self._tally.problems.append(f"{where}: {problem}")


def _root(out: Path) -> Path:
    return out / "checkpoints" / "m"


def _temporary(folder: Path) -> list[str]:
    """What has the name of something temporary, below a folder that may change meanwhile."""
    found = []
    for here, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if name.startswith(".") or (name.endswith((".tmp", ".old")) and name not in _KEPT_LOGS) or name == "probe":
                found.append(os.path.relpath(os.path.join(here, name), folder))
    return found


def _checksums(folder: Path) -> dict[str, str]:
    """Of all files that do not say where and how the run was started."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in (RUN_CONFIG, MANIFEST))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _figures(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as they are, without what is measured."""
    measured = ("Throughput/", "Time/", "Memory/")
    lines = _lines(out / "logs" / "m" / METRICS_FILE)
    return [{tag: value for tag, value in line.items() if not tag.startswith(measured)} for line in lines]


def _lines(file: Path) -> list[dict[str, Any]]:
    """Those that are whole: the last one may have been cut off."""
    content = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


# Writes that fail


@dataclass(frozen=True)
class WriteFault:
    """Lets writes below a folder fail in this process.

    kind: full: no space; denied: no permission; short: a part is written, then there is no space; limit: the kernel
    cuts writes, and then refuses them, at a file size that comes and goes. chance: of each operation; ten times that of
    a rename, of which there is one a checkpoint, when it gets its name, and one when it is deleted.
    """

    folder: str
    kind: str
    chance: float
    seed: float

    def install(self) -> None:
        source = random.Random(self.seed)
        if self.kind == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            threading.Thread(target=_move_limit, args=[source], daemon=True).start()
            return
        for name in ("mkdir", "rename", "replace", "fsync", "sendfile"):
            weight = 10 if name == "rename" else 1
            setattr(os, name, self._failing(getattr(os, name), source, weight))
        io.open = _failing_open(io.open, self, source)
        builtins.open = io.open

    def strikes(self, source: random.Random, path: object, weight: int = 1) -> bool:
        """path: of the file or folder, or a descriptor of it."""
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)  # type: ignore[call-overload]
        return str(name).startswith(self.folder) and source.random() < self.chance * weight

    def error(self, path: object) -> OSError:
        number = errno.EACCES if self.kind == "denied" else errno.ENOSPC
        return OSError(number, os.strerror(number), str(path))

    def _failing(self, action: Callable[..., Any], source: random.Random, weight: int) -> Callable[..., Any]:
        def act(path: Any, *arguments: Any, **named: Any) -> Any:
            if self.strikes(source, path, weight):
                raise self.error(path)
            return action(path, *arguments, **named)

        return act


def _failing_open(whole: Callable[..., Any], fault: WriteFault, source: random.Random) -> Callable[..., Any]:
    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if fault.strikes(source, self.name):
                if fault.kind == "short":
                    super().write(memoryview(data)[: len(data) // 2])
                raise fault.error(self.name)
            return super().write(data)

    def failing(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        below = isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(fault.folder)  # type: ignore[arg-type]
        if not below or not set(mode) & set("wa+x"):
            return whole(file, mode, *arguments, **named)
        if fault.strikes(source, file):
            raise fault.error(file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=named.get("encoding"))

    return failing


def _move_limit(source: random.Random) -> None:
    """Figures and logs are below the smallest limit, the files of weights above it or not."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    while True:
        time.sleep(source.uniform(0.02, 0.3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (source.randrange(60_000, 300_000), hard))
        time.sleep(source.uniform(0.02, 0.3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class _Disk:
    """A small file system, which somebody else fills and frees while it is turbulent."""

    def __init__(self, folder: Path, source: random.Random) -> None:
        self._ballast, self._source = folder / "ballast", source
        self.turbulent, self._over = True, threading.Event()
        self._thread = threading.Thread(target=self._fill_and_free, daemon=True)
        self._thread.start()

    def _fill_and_free(self) -> None:
        source = random.Random(self._source.random())
        while not self._over.wait(source.uniform(0.02, 0.3)):
            if self.turbulent:
                with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
                    while file.write(bytes(16384)):
                        pass
                self._over.wait(source.uniform(0.02, 0.3))
            self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def _small_disk(folder: Path, source: random.Random) -> Iterator[_Disk]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "fm9g-test", str(folder)], check=True, capture_output=True)
    try:
        with contextlib.closing(_Disk(folder, source)) as disk:
            yield disk
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def can_mount() -> bool:
    """Whether this process may mount a file system of its own, as kind "disk" does."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError, subprocess.CalledProcessError):
        with _small_disk(Path(folder) / "disk", random.Random(0)):
            return True
    return False


# What the harness must notice, for tests of it


def save_in_place() -> None:
    """Has checkpoints written under their own name, as if a rename were not needed."""

    @contextmanager
    def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        yield target

    mock.patch("fm9g.checkpoint.folder.new_folder", new_folder).start()


def forget_to_sweep() -> None:
    """Has a run leave what killed ones left."""
    mock.patch("fm9g.train.run.sweep").start()
    mock.patch("fm9g.files.recover").start()
