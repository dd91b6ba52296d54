"""Runs that are killed at random and whose writes fail at random, beside one that nobody disturbs.

A restarted run is one run from its first step to its last, in one folder and as many launches as it takes: each launch
is one or two processes, which are killed, or end, and the next goes on with `resume_ckpt auto`. After each launch
every checkpoint must be whole and the newest no older than before; after the last one everything must be as in the
undisturbed run, bit for bit, and nothing temporary may be left. A seed decides what is done when, but not what the
machine does meanwhile.
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
import sys
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
from faults.disks import Ballast, mounted
from faults.forked import pause_process
from helpers.common import index_dataset, make_records, random_text, small_model, write_jsonl
from helpers.spawn import context, start_server

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST, RUN_CONFIG
from fm9g.checkpoint.steps import list_steps
from fm9g.config.run import load_run
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.errors import UserError
from fm9g.launch.dist_env import RankInfo
from fm9g.launch.kv_store import KVServer
from fm9g.run_files import EVENTS_FILE, METRICS_FILE, read_events
from fm9g.train.runner import run_training

MAX_PROBLEMS = 5  # problems
TIMEOUT_S = 120.0  # seconds that a launch may take
FAULT_KINDS = ("full", "denied", "short", "limit", "disk")  # of failing writes: see WriteFault; disk: see _small_disk
ERROR_WORDS = ("disk is full", "No space left", "Permission denied", "File too large")  # of errors that the faults make
_KEPT_LOGS = {f"{METRICS_FILE}.old", f"{EVENTS_FILE}.old"}  # of a run that began anew under its old name


@dataclass(frozen=True)
class LaunchMode:
    """How a run is started. async_save: it writes checkpoints beside the training."""

    ranks: int
    async_save: bool

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {'async' if self.async_save else 'at once'}"


LAUNCH_MODES = tuple(LaunchMode(ranks, async_save) for ranks in (1, 2) for async_save in (False, True))


@dataclass
class FaultStats:
    """What was met. killed_while_saving: kills while a checkpoint was half written or half deleted.
    killed_before_first_step: of a launch. faulty_launches: those whose writes failed; refused_launches: those of them
    that ended with an error which says so. max_lost_steps: that had to be done again after a kill, where writes did not
    fail. failed_writes: kind -> checkpoints that could not be written; "delete": that could not be deleted. problems:
    what should not be."""

    kills: int = 0
    killed_while_saving: int = 0
    killed_before_first_step: int = 0
    runs: int = 0
    launches: int = 0
    faulty_launches: int = 0
    refused_launches: int = 0
    max_lost_steps: int = 0
    failed_writes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        return self.launches - self.runs

    def add(self, other: FaultStats) -> None:
        for name in (
            "kills",
            "killed_while_saving",
            "killed_before_first_step",
            "runs",
            "launches",
            "faulty_launches",
            "refused_launches",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_lost_steps = max(self.max_lost_steps, other.max_lost_steps)
        self.failed_writes.update(other.failed_writes)
        self.problems += other.problems


@dataclass(frozen=True)
class Reference:
    """The undisturbed run. seconds: from its start to its end. checkpoints: step -> file -> checksum."""

    seconds: float
    checkpoints: dict[int, dict[str, str]]
    metrics: list[dict[str, Any]]


class RunFixture:
    """Data and a model in a folder, for runs of so many steps, and what an undisturbed one leaves."""

    def __init__(self, folder: Path, steps: int = 14, save_iters: int = 2) -> None:
        self.folder, self.steps, self.save_iters = folder, steps, save_iters
        self._references: dict[int, Reference] = {}
        start_server()
        rng = random.Random(0)
        train_tokenizer((random_text(rng, 30) for _ in range(200)), 320, folder / "tokenizer")
        mixture = []
        for name, content in {"few": make_records(50, 1), "many": make_records(150, 2)}.items():
            index_dataset(write_jsonl(folder / f"{name}.jsonl", content), folder / "indexed" / name, "en")
            mixture.append({"task_name": name, "path": f"indexed/{name}", "abs_weight": 1.0})
        (folder / "mixture.json").write_text(json.dumps(mixture))
        (folder / "model.json").write_text(json.dumps(small_model(dropout=0.1).to_json()))

    def settings(self, out: Path, launch_mode: LaunchMode, **overrides: object) -> dict[str, str]:
        fixed: dict[str, object] = {
            "config": self.folder / "model.json",
            "dataset_config": self.folder / "mixture.json",
            "tokenizer_path": self.folder / "tokenizer",
            "output_dir": out,
            "model_unique": "m",
            "resume_ckpt": "auto",
            "train_iters": self.steps,
            "save_iters": self.save_iters,
            "async_save": launch_mode.async_save,
            "global_batch_size": 2,
            "max_length": 64,
            "warmup_iters": 2,
            "dataloader_num_workers": 0,
            "device": "cpu",
        }
        return {key: str(value) for key, value in {**fixed, **overrides}.items()}

    def any_time(self, rng: random.Random, launch_mode: LaunchMode) -> float:
        """Seconds from the start of a launch. Most launches go on from a checkpoint, and are shorter than the first."""
        return rng.uniform(0, 0.7 * self.reference(launch_mode.ranks).seconds)

    def reference(self, ranks: int) -> Reference:
        if ranks not in self._references:
            out = self.folder / f"undisturbed-{ranks}"
            began = time.monotonic()
            launch = Launch(self.settings(out, LaunchMode(ranks, False)), ranks, out.with_suffix(".log"))
            codes = launch.wait()
            assert codes == [0] * ranks, f"the undisturbed run ended with {codes}:\n{launch.log_tail()}"
            root = _root(out)
            checksums = {step: _checksums(root / str(step)) for step in list_steps(root)}
            self._references[ranks] = Reference(time.monotonic() - began, checksums, _deterministic_metrics(out))
        return self._references[ranks]


# A launch


class Launch:
    """The processes of a run, from their start until all have ended."""

    def __init__(
        self, settings: dict[str, str], ranks: int, log: Path, preexec_fn: Callable[[], object] | None = None
    ) -> None:
        """log: gets what the processes print. preexec_fn: is called in the first of them, before it trains."""
        self._log, self.timed_out = log, False
        # What an agent does; it outlives the ranks, as an agent.
        self._kv_server = KVServer(0, "", loopback_only=True) if ranks > 1 else None
        port = self._kv_server.port if self._kv_server else 0
        self._processes = [
            context.Process(
                target=_run_worker, args=(settings, rank, ranks, port, str(log), None if rank else preexec_fn)
            )
            for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def sleep(self, seconds: float) -> None:
        """Returns after so many seconds, or when the launch is over."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def kill(self, rng: random.Random) -> None:
        """Kills all processes, one after the other, as when the agent finds one dead or the machine is short of memory;
        some time may lie between."""
        for number, process in enumerate(rng.sample(self._processes, len(self._processes))):
            if number:
                self.sleep(rng.choice((0.0, rng.uniform(0, 0.4))))
            process.kill()

    def pause(self, rng: random.Random, seconds: float) -> None:
        """Stops one of the processes for so many seconds."""
        pid = rng.choice(self._processes).pid
        assert pid is not None
        pause_process(pid, seconds)

    def wait(self) -> list[int]:
        """The exit codes, when all have ended; `timed_out` where they had to be killed for that."""
        self.sleep(TIMEOUT_S)
        self.timed_out = self.is_alive()
        for process in self._processes:
            process.kill()
            process.join()
        if self._kv_server:
            self._kv_server.close()
        return [process.exitcode or 0 for process in self._processes]

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:]) if self._log.is_file() else ""


def _run_worker(
    settings: dict[str, str], rank: int, ranks: int, port: int, log: str, preexec_fn: Callable[[], object] | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    rank_info = RankInfo(rank, rank, ranks, ranks, master_port=port, launcher="fm9g", timeout=30) if ranks > 1 else None
    if preexec_fn:
        preexec_fn()
    try:
        run_training(load_run(settings["config"], settings), rank_info)
    except UserError as error:
        print(f"UserError: {error}")
        sys.exit(2)


# Restarted runs


def kill_at_random(
    fixture: RunFixture,
    launch_mode: LaunchMode,
    kills: int,
    seed: int,
    *,
    max_per_run: int = 8,
    saving_fraction: float = 0.5,
    max_problems: int = MAX_PROBLEMS,
    preexec_fn: Callable[[], object] | None = None,
    **overrides: object,
) -> FaultStats:
    """Restarted runs with `kills` kills in all, at most `max_per_run` in one.

    saving_fraction: of the kills that wait until a checkpoint is being written or deleted. max_problems: those after
    which no further restarted run begins. preexec_fn, overrides: a call and settings of the disturbed launches, for
    tests of this test.
    """
    stats = FaultStats()
    while stats.kills < kills and len(stats.problems) < max_problems:
        number = stats.runs
        rng = random.Random(f"{seed} {launch_mode} {number}")
        restarted_run = RestartedRun(fixture, launch_mode, "kills", seed, stats, rng.choice((0, 2)), overrides)
        kills_left = min(rng.randint(1, max_per_run), kills - stats.kills)
        while not restarted_run.is_finished:
            launch = restarted_run.start(preexec_fn, "")
            if kills_left:
                if rng.random() < saving_fraction:
                    restarted_run.wait_for_writing(launch, rng.randint(1, 3))
                    launch.sleep(0.1 * rng.random() ** 2)
                else:
                    launch.sleep(fixture.any_time(rng, launch_mode))
                launch.kill(rng)
            kills_left -= restarted_run.end(launch)
        restarted_run.close()
    return stats


def fail_writes_at_random(
    fixture: RunFixture,
    launch_mode: LaunchMode,
    launches: int,
    seed: int,
    kinds: Sequence[str] = FAULT_KINDS,
    max_per_run: int = 4,
) -> FaultStats:
    """Restarted runs with so many launches whose writes fail, at most `max_per_run` in one; some are killed besides.

    kinds: those of FAULT_KINDS to choose from. A restarted run has one of its own where that is "disk".
    """
    stats = FaultStats()
    while stats.faulty_launches < launches and len(stats.problems) < MAX_PROBLEMS:
        rng = random.Random(f"faults {seed} {launch_mode} {stats.runs}")
        disk_here = rng.choice(kinds) == "disk"
        others = ["disk"] if disk_here else [kind for kind in kinds if kind != "disk"]
        limit = 2 if disk_here else rng.choice((0, 2))  # more would not fit
        restarted_run = RestartedRun(fixture, launch_mode, "faults", seed, stats, limit, {})
        # One more launch ends the restarted run in peace.
        faulty = min(rng.randint(1, max_per_run), launches - stats.faulty_launches)
        with _small_disk(restarted_run.root.parent, rng) if disk_here else contextlib.nullcontext() as disk:
            while not restarted_run.is_finished:
                kind = rng.choice(others) if faulty > 0 else ""
                fault = WriteFault(str(restarted_run.root), kind, rng.choice((0.003, 0.01, 0.05)), rng.random())
                if disk:
                    disk.active = bool(kind)
                back = 0  # a launch that goes back writes over what is there; without a limit, which keeps the newest
                if kind and not limit and rng.random() < 0.3:
                    back = rng.choice([0, *list_steps(restarted_run.root)])
                launch = restarted_run.start(fault.install if kind not in ("", "disk") else None, kind, back)
                if kind and not back and rng.random() < 0.4:
                    launch.sleep(fixture.any_time(rng, launch_mode))
                    launch.kill(rng)
                restarted_run.end(launch)
                faulty -= 1
            restarted_run.close()
    return stats


class RestartedRun:
    """One run in its folder, launch after launch; what is met goes into the stats."""

    def __init__(
        self,
        fixture: RunFixture,
        launch_mode: LaunchMode,
        kind: str,
        seed: int,
        stats: FaultStats,
        limit: int,
        overrides: dict[str, object],
    ) -> None:
        """limit: checkpoints that are kept, 0 for all. overrides: settings."""
        self._fixture, self._launch_mode, self._label, self._stats = fixture, launch_mode, f"{kind}, seed {seed}", stats
        self._out = fixture.folder / f"{kind}-{seed}-{stats.runs}-{launch_mode.ranks}-{launch_mode.async_save:d}"
        self._settings = fixture.settings(self._out, launch_mode, save_total_limit=limit, **overrides)
        self.root, self.is_finished = _root(self._out), False
        self._newest, self._failures, self._before = 0, 0, len(stats.problems)
        fixture.reference(launch_mode.ranks)
        stats.runs += 1

    def start(self, preexec_fn: Callable[[], object] | None, kind: str, back: int = 0) -> Launch:
        """kind: of writes that fail, or empty. back: the step to go on from; 0: the newest checkpoint."""
        self._stats.launches += 1
        self._stats.faulty_launches += bool(kind)
        self._kind, self._began = kind, time.time()
        settings = {**self._settings, **({"resume_ckpt": str(back)} if back else {})}
        return Launch(settings, self._launch_mode.ranks, self._out.with_suffix(".log"), preexec_fn)

    def wait_for_writing(self, launch: Launch, times: int) -> None:
        """Returns when something temporary has appeared so many times, or the launch is over."""
        was = True
        while times and launch.is_alive():
            deadline = time.monotonic() + 0.05
            while times and time.monotonic() < deadline:
                now = bool(_temporary(self.root))
                times -= now and not was
                was = now
                time.sleep(0.0003)

    def end(self, launch: Launch) -> int:
        """Looks at what a launch left; returns whether it was killed."""
        codes = launch.wait()
        stats, killed = self._stats, -signal.SIGKILL in codes
        events = [event for event in read_events(self._log(EVENTS_FILE)) if (event["time"] or 0) >= self._began]
        if launch.timed_out:
            self._add_problem(f"a launch did not end within {TIMEOUT_S:.0f} s:\n{launch.log_tail()}")
        if killed:
            stats.kills += 1
            stats.killed_while_saving += bool(_temporary(self.root))
            stats.killed_before_first_step += not any(event["kind"] in ("start", "resume") for event in events)
        elif not any(codes):
            self.is_finished = True
        elif self._kind and set(codes) == {2}:
            stats.refused_launches += 1
        else:
            self._add_problem(f"a launch ended with {codes}:\n{launch.log_tail()}")
            self._failures += 1
            self.is_finished = self._failures > 2
        for event in events:
            if event["kind"] in ("save_failed", "prune_failed"):
                stats.failed_writes[self._kind if event["kind"] == "save_failed" else "delete"] += 1
                if not self._kind or not any(words in event["text"] for words in ERROR_WORDS):
                    self._add_problem(f"an event that nobody caused: {event}")
        self._look_at_checkpoints(killed)
        if not killed and (left := _temporary(self._out)):
            self._add_problem(f"a launch that ended by itself left {left}")
        return killed

    def _look_at_checkpoints(self, killed: bool) -> None:
        complete = [0]
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder.name.isdecimal():
                try:
                    complete.append(Checkpoint(folder).step)
                except UserError as error:
                    self._add_problem(f"a damaged checkpoint: {error}")
        if max(complete) < self._newest:
            self._add_problem(f"the newest checkpoint was that of step {self._newest}, and is that of {max(complete)}")
        self._newest = max(complete)
        if killed and not self._kind:
            lost = max([line["step"] for line in _lines(self._log(METRICS_FILE))] or [0]) - self._newest
            self._stats.max_lost_steps = max(self._stats.max_lost_steps, lost)
            # A step is logged before its checkpoint begins; one that is written beside may take until the next.
            if lost > self._fixture.save_iters * (1 + self._launch_mode.async_save):
                self._add_problem(f"{lost} steps were lost")

    def close(self) -> None:
        """Compares the restarted run with the undisturbed run, and deletes its folder where all is well."""
        reference, fixture = self._fixture.reference(self._launch_mode.ranks), self._fixture
        steps = list_steps(self.root)
        if not steps or steps[-1] != fixture.steps:
            self._add_problem(f"ended with the checkpoints {steps}")
        for step in steps:
            found, wanted = _checksums(self.root / str(step)), reference.checkpoints[step]
            if differing := sorted(name for name in wanted if found.get(name) != wanted[name]):
                self._add_problem(f"step {step} is not that of the undisturbed run: {', '.join(differing)}")
        if (metrics := _deterministic_metrics(self._out)) != reference.metrics:
            differing = [line["step"] for line, other in zip(metrics, reference.metrics) if line != other]
            self._add_problem(f"{len(metrics)} lines of figures; steps that differ: {differing}")
        if left := _temporary(self._out):
            self._add_problem(f"left behind: {left}")
        if len(self._stats.problems) == self._before:
            for path in (self._out, self._out.with_suffix(".log")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _log(self, name: str) -> Path:
        return self._out / "logs" / "m" / name

    def _add_problem(self, problem: str) -> None:
        where = f"{self._launch_mode}, {self._label}, restarted run {self._stats.runs}, launch {self._stats.launches}"
        self._stats.problems.append(f"{where}: {problem}")


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


def _deterministic_metrics(out: Path) -> list[dict[str, Any]]:
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
        rng = random.Random(self.seed)
        if self.kind == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            threading.Thread(target=_move_limit, args=[rng], daemon=True).start()
            return
        for name in ("mkdir", "rename", "replace", "fsync", "sendfile"):
            weight = 10 if name == "rename" else 1
            setattr(os, name, self._failing(getattr(os, name), rng, weight))
        io.open = _failing_open(io.open, self, rng)
        builtins.open = io.open

    def strikes(self, rng: random.Random, path: object, weight: int = 1) -> bool:
        """path: of the file or folder, or a descriptor of it."""
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)  # type: ignore[call-overload]
        return str(name).startswith(self.folder) and rng.random() < self.chance * weight

    def error(self, path: object) -> OSError:
        number = errno.EACCES if self.kind == "denied" else errno.ENOSPC
        return OSError(number, os.strerror(number), str(path))

    def _failing(self, action: Callable[..., Any], rng: random.Random, weight: int) -> Callable[..., Any]:
        def act(path: Any, *arguments: Any, **named: Any) -> Any:
            if self.strikes(rng, path, weight):
                raise self.error(path)
            return action(path, *arguments, **named)

        return act


def _failing_open(real_open: Callable[..., Any], fault: WriteFault, rng: random.Random) -> Callable[..., Any]:
    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if fault.strikes(rng, self.name):
                if fault.kind == "short":
                    super().write(memoryview(data)[: len(data) // 2])
                raise fault.error(self.name)
            return super().write(data)

    def failing(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        below = isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(fault.folder)  # type: ignore[arg-type]
        if not below or not set(mode) & set("wa+x"):
            return real_open(file, mode, *arguments, **named)
        if fault.strikes(rng, file):
            raise fault.error(file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=named.get("encoding"))

    return failing


def _move_limit(rng: random.Random) -> None:
    """Figures and logs are below the smallest limit, the files of weights above it or not."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    while True:
        time.sleep(rng.uniform(0.02, 0.3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(60_000, 300_000), hard))
        time.sleep(rng.uniform(0.02, 0.3))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def _small_disk(folder: Path, rng: random.Random) -> Iterator[Ballast]:
    """A disk of 3 MB, which another program fills and frees."""
    folder.mkdir(parents=True)
    with mounted(folder, "size=3m"), Ballast(folder, rng, pause=(0.02, 0.3), chunk=16384) as ballast:
        yield ballast
    folder.rmdir()


# What the harness must notice, for tests of it


def save_in_place() -> None:
    """Has checkpoints written under their own name, as if a rename were not needed."""

    @contextmanager
    def atomic_dir(target: Path, overwrite: bool = False) -> Iterator[Path]:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        yield target

    mock.patch("fm9g.checkpoint.save.atomic_dir", atomic_dir).start()


def forget_to_sweep() -> None:
    """Has a run leave what killed ones left."""
    mock.patch("fm9g.train.runner.clean_stale_temps").start()
    mock.patch("fm9g.io.atomic.recover_interrupted").start()
