"""A few of the attempts that benchmarks/faults/disturb.py makes by the hundred, and what the harness must notice."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
from faults import system
from faults.attempts import Attempts
from faults.commands import COMMANDS, HALF, Bed, KillAt, attempt, kill_at_every_change, kill_at_random
from faults.system import HOUR, Runs
from support import records

from fm9g.checkpoint.folder import Snapshot, save_checkpoint
from fm9g.config.mixture import load_mixture
from fm9g.config.train import TrainConfig
from fm9g.data import build
from fm9g.data.mixture import Mixture
from fm9g.data.pool import EncodingPool, fill_cache
from fm9g.errors import UserError
from fm9g.launch.place import Place
from fm9g.report.files import read_metrics
from fm9g.train.metrics import Metrics
from fm9g.train.resume import find_checkpoint

pytestmark = pytest.mark.xdist_group("faults")  # the server of their processes is that of tests/train/test_faults.py
SEED = int(os.environ.get("FM9G_FAULT_SEED", 1))
INDEX, WORKERS, MERGE = "data index", "data index, workers", "lora merge to .pt"
needs_mounts = pytest.mark.skipif(not system.can_mount(), reason="this user may not mount a small disk")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("faults") / "bed", [INDEX, WORKERS])


@pytest.fixture(scope="module")
def whole_bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("faults") / "bed")


@pytest.fixture(scope="module")
def runs(whole_bed: Bed) -> Runs:
    return Runs(whole_bed)


def assert_nothing_lost(made: Attempts, least: int = 1) -> None:
    assert not made.problems, "\n\n".join(made.problems)
    assert made.number >= least


def test_a_killed_command_leaves_the_old_or_the_new(bed: Bed) -> None:
    made = kill_at_every_change(bed, INDEX, stride=4)
    assert made.kills > 5
    assert_nothing_lost(made)
    assert_nothing_lost(kill_at_random(bed, INDEX, 4, SEED))


@needs_mounts
def test_a_command_on_a_small_disk(bed: Bed) -> None:
    made = system.small_disks(bed, INDEX, 2)
    assert_nothing_lost(made, 4)
    assert made.met["refused"]


@needs_mounts
def test_a_command_without_shared_memory(bed: Bed) -> None:
    assert_nothing_lost(system.no_shared_memory(bed, WORKERS, 1))


def test_a_command_that_may_not_read_or_write(bed: Bed) -> None:
    made = system.closed_folders(bed, INDEX)
    assert made.met == {"refused": 3}
    assert_nothing_lost(made)


def test_a_command_whose_clock_steps(bed: Bed) -> None:
    assert_nothing_lost(system.stepping_clocks(bed, INDEX, 2, SEED))


def test_two_commands_for_one_target(bed: Bed) -> None:
    assert_nothing_lost(system.two_at_once(bed, INDEX, 2, SEED))


def test_a_command_whose_worker_is_killed(bed: Bed) -> None:
    made = system.killed_workers(bed, WORKERS, 1, SEED)
    assert made.kills
    assert_nothing_lost(made)


# What the harness must notice


@dataclass(frozen=True)
class Breaking:
    """Kills a command in which a function is replaced by one that is not as careful."""

    place: str
    function: Callable[..., object]
    number: int

    def __call__(self) -> None:
        mock.patch(self.place, self.function).start()
        KillAt(self.number)()


@contextmanager
def folder_in_place(target: Path, overwrite: bool = False) -> Iterator[Path]:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    yield target


def test_a_folder_that_is_written_in_place_is_noticed(bed: Bed) -> None:
    made = Attempts("in place")
    attempt(bed, INDEX, made, [Breaking("fm9g.data.build.new_folder", folder_in_place, 10)], fresh=False)
    assert "left neither old nor new" in made.problems[0]


def test_what_nobody_clears_away_is_noticed(bed: Bed) -> None:
    made = Attempts("left behind")
    with mock.patch.object(bed, "input_state", {}):
        attempt(bed, INDEX, made, [], fresh=True)
    assert "what it reads was changed" in made.problems[0]


# What the long test found, one by one


def test_a_line_of_figures_that_was_cut_off_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    for file in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / file).write_text('{"step": 1, "kind": "save", "text": ""}\n')
    with Metrics(tmp_path, [], first_step=1, last_step=9) as metrics:
        for file in ("metrics.jsonl", "events.jsonl"):
            with (tmp_path / file).open("a") as cut:
                cut.write('{"step": 2, "Lo')
        metrics.write(3, {"Loss/train": 1.0})
        metrics.event(3, "save", "written")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["step"] == 3


class Broken:
    """A pool one of whose processes was just killed."""

    _executor_manager_thread = None

    def submit(self, *_: object) -> None:
        raise BrokenProcessPool("A child process terminated abruptly")

    def shutdown(self, wait: bool) -> None: ...


def test_a_worker_that_is_killed_between_two_results_is_told_of() -> None:
    pool: Any = Broken()
    with pytest.raises(UserError, match="was killed"):
        list(build._in_order([(build.convert_lines, (), 0)], pool, ahead=1))
    encoding = EncodingPool.__new__(EncodingPool)
    encoding._pool, encoding.workers, encoding._doing = pool, 1, []
    encoding.mixture = cast(Any, SimpleNamespace(datasets=[np.zeros(3)]))
    with pytest.raises(UserError, match="was killed"):
        list(encoding.tokens(0, iter(range(3))))


def test_what_lies_beside_a_token_cache_that_is_whole_is_cleared_away(
    make_mixture: Callable[..., Path], tokenizer_path: Path, tmp_path: Path
) -> None:
    configs = [item.value for item in load_mixture(make_mixture({"a": records(9)}))]
    mixture, _ = fill_cache(Mixture(configs, str(tokenizer_path), 64, 3, 128, str(tmp_path / "cache")), 0)
    cache = mixture.cache_folder(0)
    shutil.copytree(cache, cache.with_name(f".{cache.name}.5.old"))  # a kill before the old one was deleted
    fill_cache(mixture, 0)
    assert [folder.name for folder in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("skew", [-HOUR, HOUR])
def test_a_restart_knows_its_own_checkpoints_whatever_the_clocks_say(tmp_path: Path, skew: float) -> None:
    def save(step: int) -> None:
        empty: Any = type("Nothing", (list,), {"like": {}})()
        folder = save_checkpoint(tmp_path, Snapshot(step, empty, None, None, {}, {}, {}, {}))
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time.time() + skew, time.time() + skew))

    save(7)  # of a run that is given up
    config, log = TrainConfig(overwrite=True), tmp_path / "log"
    place = Place(launcher="fm9g", started=time.time())
    assert find_checkpoint(config, place, tmp_path, log) == (None, [])
    again = replace(place, attempt=1)
    assert find_checkpoint(config, again, tmp_path, log) == (None, [])
    save(3)
    found, _ = find_checkpoint(config, again, tmp_path, log)
    assert found is not None
    assert found.step == 3
    later = replace(again, started=place.started + 1)  # another run, which never came so far as to note its start
    assert find_checkpoint(config, later, tmp_path, log) == (None, [])


@pytest.mark.slow
def test_weights_and_their_configuration_get_their_names_one_right_after_the_other(whole_bed: Bed) -> None:
    made = kill_at_every_change(whole_bed, "convert to .pt")
    assert_nothing_lost(made)
    assert made.met[HALF] <= 6  # nothing but what clears away lies between


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("report", "plot")])
def test_every_command(whole_bed: Bed, name: str) -> None:
    assert_nothing_lost(kill_at_every_change(whole_bed, name, stride=3))
    assert_nothing_lost(kill_at_random(whole_bed, name, 5, SEED))
    assert_nothing_lost(system.closed_folders(whole_bed, name))
    assert_nothing_lost(system.two_at_once(whole_bed, name, 2, SEED))
    if system.can_mount():
        assert_nothing_lost(system.small_disks(whole_bed, name, 3))


@pytest.mark.slow
def test_runs(runs: Runs) -> None:
    assert_nothing_lost(system.vanishing_checkpoints(runs, 4, SEED))
    assert_nothing_lost(system.looks_while_saving(runs, 8))
    assert_nothing_lost(system.runs_with_stepping_clocks(runs, 2, SEED))
    assert_nothing_lost(system.disturbed_runs(runs, "a worker is killed", 2, SEED, system.kill_worker, "killed"))
    if system.can_mount():
        assert_nothing_lost(system.full_logs(runs, 2, SEED))
        assert_nothing_lost(system.runs_without_shared_memory(runs, 1))
