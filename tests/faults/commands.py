"""Commands that are killed: at every file that they make, rename or delete, and at random moments.

An attempt is one command that is killed, perhaps several times, and then let run. After each kill its target must hold
what it held before or what an undisturbed command leaves, byte for byte; after the undisturbed end nothing temporary
may be there, and what the command reads must be as it was.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from faults.attempts import AttemptResults, State, clear, differences, is_temporary, state, without_temporary
from faults.forked import EndedCommand, RunningCommand
from helpers.common import make_records, random_text, small_model, write_jsonl

from fm9g import quickstart
from fm9g.data.encode.tokenizer_training import train_tokenizer

NEW, OLD, ASIDE = "the new", "the old", "the old, moved aside"
HALF, PAIR = "the new .json, the old .pt", {"out.json", "out.pt"}
Kill = Callable[[], object] | float  # what is called in the process before the command, or seconds after its start


@dataclass(frozen=True)
class Command:
    """A command that writes. argv: of it; {in} is the folder of what it reads; it runs where its target is.
    setup_argv: of the command that made the target which it replaces."""

    name: str
    argv: str
    setup_argv: str


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "data index",
            "data index --path {in}/a.jsonl --language en --output out --overwrite",
            "data index --path {in}/b.jsonl --language en --output out",
        ),
        Command(
            "data index, split",
            "data index --path {in}/bad.jsonl --language en --output out --split 0.3 --skip-bad --overwrite",
            "data index --path {in}/b.jsonl --language en --output out --split 0.5",
        ),
        Command(
            "data index, workers",
            "data index --path {in}/a.jsonl --language en --output out --workers 2 --overwrite",
            "data index --path {in}/b.jsonl --language en --output out",
        ),
        Command(
            "data tokenizer",
            "data tokenizer {in}/a.jsonl --vocab_size 300 --output out --overwrite",
            "data tokenizer {in}/b.jsonl --vocab_size 290 --output out",
        ),
        Command(
            "data check",
            "data check {in}/mixture.json --tokenizer {in}/tokenizer --max_length 64 --output out --overwrite",
            "data check {in}/mixture.json --tokenizer {in}/tokenizer --max_length 32 --output out",
        ),
        Command(
            "token cache",
            "train --config {in}/model.json --dataset_config {in}/one.json --tokenizer_path {in}/tokenizer "
            "--token_cache_dir out --only_run_dataloader true --train_iters 1 --max_length 64 "
            "--dataloader_num_workers 0",
            "train --config {in}/model.json --dataset_config {in}/one.json --tokenizer_path {in}/tokenizer-old "
            "--token_cache_dir out --only_run_dataloader true --train_iters 1 --max_length 64 "
            "--dataloader_num_workers 0",
        ),
        Command(
            "convert to .pt",
            "convert {in}/hf out.pt --overwrite",
            "convert {in}/hf-old out.pt --dtype bf16",
        ),
        Command("convert to a folder", "convert {in}/runs/m/4 out --overwrite", "convert {in}/runs/m/2 out"),
        Command(
            "convert to a folder, bin",
            "convert {in}/runs/m/4 out --format bin --overwrite",
            "convert {in}/runs/m/2 out",
        ),
        Command(
            "lora merge to .pt",
            "lora merge {in}/base.pt {in}/runs/l/4 out.pt --overwrite",
            "lora merge {in}/base.pt {in}/runs/l/2 out.pt --dtype bf16",
        ),
        Command(
            "lora merge to a folder",
            "lora merge {in}/hf {in}/runs/l/4 out --overwrite",
            "lora merge {in}/hf {in}/runs/l/2 out",
        ),
        Command(
            "lora combine",
            "lora combine {in}/runs/l/4 {in}/runs/l/2 --weights 1 0.5 --out out --overwrite",
            "lora combine {in}/runs/l/2 {in}/runs/l/2 --out out",
        ),
        Command("lora export", "lora export {in}/runs/l/4 out --overwrite", "lora export {in}/runs/l/2 out"),
        Command("lora import", "lora import {in}/peft out --overwrite", "lora import {in}/peft-old out"),
        Command("report", "report {in}/logs/m --output out.html --overwrite", "report {in}/logs/l --output out.html"),
        Command("plot", "plot {in}/logs/m --output out.png --overwrite", "plot {in}/logs/l --output out.png"),
    )
}


class CommandFixture:
    """What commands read, a folder where they write, and what an undisturbed one leaves."""

    def __init__(self, folder: Path, names: Sequence[str] = tuple(COMMANDS)) -> None:
        """names: of the commands, for which there is what they read."""
        self.folder, self.inputs, self.work = folder, folder / "in", folder / "work"
        self.inputs.mkdir(parents=True)
        self.work.mkdir()
        self._undisturbed: dict[str, Undisturbed] = {}
        rng = random.Random(0)
        write_jsonl(self.inputs / "a.jsonl", make_records(60, 1))
        write_jsonl(self.inputs / "b.jsonl", make_records(40, 2))
        good = (self.inputs / "a.jsonl").read_bytes()
        (self.inputs / "bad.jsonl").write_bytes(good + b'{"input": 1}\n' + good)
        for name, size in {"tokenizer": 320, "tokenizer-old": 310}.items():
            train_tokenizer((random_text(rng, 30) for _ in range(200)), size, self.inputs / name)
        (self.inputs / "model.json").write_text(json.dumps(small_model().to_json()))
        for name in ("a", "b"):
            self._make(f"data index --path {{in}}/{name}.jsonl --language en --output {{in}}/indexed/{name}")
        entries = [{"task_name": name, "path": f"indexed/{name}", "abs_weight": 1.0} for name in "ab"]
        (self.inputs / "mixture.json").write_text(json.dumps(entries))
        (self.inputs / "one.json").write_text(json.dumps(entries[:1]))
        if not all(name.startswith("data") for name in names):
            self._train()
        self.input_state = state(self.inputs)

    def _train(self) -> None:
        """A run of a model and one of an adapter, and what is made of them."""
        keys = (
            "train --config {in}/model.json --dataset_config {in}/mixture.json --tokenizer_path {in}/tokenizer "
            "--output_dir {in}/data --train_iters 4 --save_iters 2 --global_batch_size 2 --max_length 64 "
            "--warmup_iters 1 --dataloader_num_workers 0 --device cpu --async_save false --report_to none"
        )
        self._make(f"{keys} --model_unique m")
        self._make("convert {in}/data/checkpoints/m/4 {in}/hf")
        self._make("convert {in}/data/checkpoints/m/2 {in}/hf-old")
        self._make("convert {in}/hf {in}/base.pt")
        self._make(f"{keys} --model_unique l --pretrained_model {{in}}/base.pt --lora_layer all --lora_r 2")
        (self.inputs / "data/checkpoints").rename(self.inputs / "runs")
        (self.inputs / "data/logs").rename(self.inputs / "logs")
        self._make("lora export {in}/runs/l/4 {in}/peft")
        self._make("lora export {in}/runs/l/2 {in}/peft-old")

    def _make(self, command: str) -> None:
        ended = self.run(command)
        assert ended.returncode == 0, f"{command}: {ended}"

    def start(self, command: str, preexec_fn: Callable[[], object] | None = None) -> RunningCommand:
        """preexec_fn: is called in the process before the command."""
        return RunningCommand(
            [word.replace("{in}", str(self.inputs)) for word in command.split()], self.work, preexec_fn
        )

    def run(self, command: str, kill: Kill | None = None) -> EndedCommand:
        if not isinstance(kill, float):
            return self.start(command, kill).wait()
        running = self.start(command)
        running.kill_after(kill)
        return running.wait()

    def undisturbed(self, command: Command) -> Undisturbed:
        if command.name not in self._undisturbed:
            self._undisturbed[command.name] = Undisturbed(self, command)
        return self._undisturbed[command.name]


class Undisturbed:
    """What a command leaves that nobody disturbs. start: a copy of what is there before it, as in `Command.setup_argv`.
    seconds: that it takes. sizes: bytes of the files that it makes."""

    def __init__(self, fixture: CommandFixture, command: Command) -> None:
        self.start = fixture.folder / "before" / command.name.replace(" ", "-")
        self.start.mkdir(parents=True)
        clear(fixture.work)
        fixture._make(command.setup_argv)
        clear(self.start, fixture.work)
        self.before = state(self.start)
        ended = fixture.run(command.argv)
        assert ended.returncode == 0, ended
        self.after, self.seconds = state(fixture.work), ended.seconds
        self.sizes = [path.stat().st_size for path in fixture.work.rglob("*") if path.is_file()]
        clear(fixture.work)
        again = fixture.run(command.argv)
        self.seconds = min(self.seconds, again.seconds)
        assert again.returncode == 0, again
        assert state(fixture.work) == self.after, differences(state(fixture.work), self.after)
        assert self.after != self.before


# Kills


@dataclass(frozen=True)
class KillAt:
    """Kills this process before its n-th change of a name or opening of a file for writing."""

    number: int

    def __call__(self) -> None:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if (event == "open" and _writes(*arguments)) or event in _CHANGES:
                count += 1
                if count == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def _writes(path: object, mode: object, flags: int) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def kill_at_every_change(fixture: CommandFixture, name: str, stride: int = 1) -> AttemptResults:
    """Kills a command before each of its changes, one an attempt, until it has no more; with and without a target
    that is there already. stride: 3 for the first, the fourth, and so on."""
    results = AttemptResults(f"{name}: killed before each change of a file")
    for fresh in (True, False):
        number = 1
        while attempt(fixture, name, results, [KillAt(number)], fresh):
            number += stride
    return results


def kill_at_random(fixture: CommandFixture, name: str, kills: int, seed: int) -> AttemptResults:
    """Kills a command so many times at moments that are equally likely over its length, up to three an attempt."""
    results = AttemptResults(f"{name}: killed at a random moment")
    rng = random.Random(f"{seed} {name}")
    while results.kills < kills and results.count < 3 * kills:
        seconds = fixture.undisturbed(COMMANDS[name]).seconds
        moments = [rng.uniform(0, seconds) for _ in range(rng.randint(1, 3))]
        attempt(fixture, name, results, moments, fresh=rng.random() < 0.5)
    return results


def attempt(fixture: CommandFixture, name: str, results: AttemptResults, kills: Sequence[Kill], fresh: bool) -> bool:
    """Kills a command again and again, then lets it run; looks at what is there after each. Returns whether any kill
    was in time."""
    command = COMMANDS[name]
    undisturbed = fixture.undisturbed(command)
    before: State = {} if fresh else undisturbed.before
    clear(fixture.work, None if fresh else undisturbed.start)
    in_time = False
    for kill in kills:
        ended = fixture.run(command.argv, kill)
        if ended.returncode != -signal.SIGKILL or ended.timed_out:
            results.add_outcome("had ended")
            if ended.returncode:
                results.add_problem(f"{_said(kill, fresh)}: ended with {ended.returncode}", ended)
            break
        in_time = True
        results.kills += 1
        left = state(fixture.work)
        how = _what_is_left(left, before, undisturbed.after)
        results.add_outcome(how or "neither")
        if not how:
            results.add_problem(f"{_said(kill, fresh)}: left neither old nor new: {differences(left, before)}", ended)
        if ended.orphans:
            results.add_problem(f"{_said(kill, fresh)}: {ended.orphans} processes lived on", ended)
    end(fixture, command, results, f"{[_said(kill, fresh) for kill in kills]}")
    return in_time


def _what_is_left(left: State, before: State, after: State) -> str:
    """What a killed command left, in words; empty where it is none of what may be."""
    found = without_temporary(left)
    if found == after:
        return NEW
    if found == before:
        return OLD
    if not found and _names_back(left) == before:
        return ASIDE
    # Two files, each whole, get their names one after the other.
    full = set(found) <= set(after) and all(found.get(name) in (before.get(name), after[name]) for name in after)
    return HALF if set(after) == PAIR and full else ""


def _names_back(left: State) -> State:
    """What the next command finds: .NAME.NUMBER.old is NAME, which was moved aside."""
    aside = (re.fullmatch(r"(.+/)?\.([^/]+)\.\d+\.old(/.*)", path) for path in left)
    return {(match[1] or "") + match[2] + match[3]: left[match[0]] for match in aside if match}


def end(fixture: CommandFixture, command: Command, results: AttemptResults, where: str) -> None:
    """The same command once more, undisturbed. It must leave what it should and nothing else."""
    for path in fixture.work.rglob(
        ".*.new"
    ):  # as if a minute had passed: until then another process may be about to use them
        os.utime(path, (1, 1))
    ended = fixture.run(command.argv)
    found = state(fixture.work)
    if ended.returncode:
        results.add_problem(f"{where}: the next command ended with {ended.returncode}", ended)
    elif found != fixture.undisturbed(command).after:
        results.add_problem(
            f"{where}: after the next command: {differences(found, fixture.undisturbed(command).after)}", ended
        )
    if (inputs := state(fixture.inputs)) != fixture.input_state:
        results.add_problem(f"{where}: what it reads was changed: {differences(inputs, fixture.input_state)}")
        fixture.input_state = inputs


def _said(kill: Kill, fresh: bool) -> str:
    when = f"after {kill:.4f} s" if isinstance(kill, float) else str(kill)
    return f"{when}, {'no' if fresh else 'an old'} target"


# The whole path


QUICKSTART = "quickstart --out out --steps 2 --overwrite"
_FOLDERS = ("datasets/sources", "datasets/docstrings", "tokenizer", "hf")  # each appears whole


def few_sources() -> None:
    """Has quickstart read the first files of the standard library alone."""
    full = quickstart.library_sources
    mock.patch("fm9g.quickstart.library_sources", return_value=full()[:40]).start()
    mock.patch("fm9g.quickstart.generate", return_value="").start()


def kill_quickstart(fixture: CommandFixture, kills: int, seed: int) -> AttemptResults:
    """Kills `fm9g quickstart` at random moments, again and again in one folder; then lets it run."""
    results = AttemptResults("quickstart: killed at a random moment")
    rng = random.Random(f"{seed} quickstart")
    clear(fixture.work)
    full = fixture.run(QUICKSTART, few_sources)
    assert full.returncode == 0, full
    wanted = {folder: set(state(fixture.work / "out" / folder)) for folder in _FOLDERS}
    clear(fixture.work)
    while results.kills < kills and results.count < 3 * kills:
        running = fixture.start(QUICKSTART, few_sources)
        running.kill_after(rng.uniform(0, full.seconds))
        ended = running.wait()
        results.kills += ended.returncode == -signal.SIGKILL
        there = [folder for folder in _FOLDERS if (fixture.work / "out" / folder).exists()]
        results.add_outcome(f"{len(there)} of {len(_FOLDERS)} folders there" if ended.returncode else "had ended")
        for folder in there:
            if set(state(fixture.work / "out" / folder)) != wanted[folder]:
                results.add_problem(f"{folder} is not whole", ended)
        if ended.returncode not in (0, -signal.SIGKILL):
            results.add_problem(f"ended with {ended.returncode}", ended)
    ended = fixture.run(QUICKSTART, few_sources)
    if ended.returncode or [path for path in state(fixture.work) if is_temporary(path) and not path.endswith(".new/")]:
        results.add_problem(f"the next command: {[path for path in state(fixture.work) if is_temporary(path)]}", ended)
    return results
