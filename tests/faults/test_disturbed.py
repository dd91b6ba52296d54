"""A few of the attempts that campaign_commands.py makes by the hundred, and what the harness must notice."""

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

import pytest
from faults import system
from faults.attempts import AttemptResults
from faults.commands import COMMANDS, HALF, CommandFixture, KillAt, attempt, kill_at_every_change, kill_at_random
from faults.disks import can_mount
from faults.system import HOUR, Runs
from helpers.common import make_records, write_jsonl

from fm9g.checkpoint.save import Snapshot, save_checkpoint
from fm9g.config.mixture import load_mixture
from fm9g.config.train import TrainConfig
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_cache_builder import build_token_cache
from fm9g.data.prepare.index_tasks import convert_source
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import DataSource
from fm9g.errors import UserError
from fm9g.launch.dist_env import RankInfo
from fm9g.run_files import RunFolders, read_metrics
from fm9g.train.metrics_logger import MetricsLogger
from fm9g.train.resume import find_resume_checkpoint

pytestmark = pytest.mark.xdist_group("faults")  # the server of their processes is that of test_runs.py
SEED = int(os.environ.get("FM9G_FAULT_SEED", 1))
INDEX, WORKERS, MERGE = "data index", "data index, workers", "lora merge to .pt"
needs_mounts = pytest.mark.skipif(not can_mount(), reason="this user may not mount a small disk")


@pytest.fixture(scope="module")
def command_fixture(tmp_path_factory: pytest.TempPathFactory) -> CommandFixture:
    return CommandFixture(tmp_path_factory.mktemp("faults") / "commands", [INDEX, WORKERS])


@pytest.fixture(scope="module")
def full_fixture(tmp_path_factory: pytest.TempPathFactory) -> CommandFixture:
    return CommandFixture(tmp_path_factory.mktemp("faults") / "commands")


@pytest.fixture(scope="module")
def runs(full_fixture: CommandFixture) -> Runs:
    return Runs(full_fixture)


def assert_nothing_lost(results: AttemptResults, min_attempts: int = 1) -> None:
    assert not results.problems, "\n\n".join(results.problems)
    assert results.count >= min_attempts


def test_a_killed_command_leaves_the_old_or_the_new(command_fixture: CommandFixture) -> None:
    results = kill_at_every_change(command_fixture, INDEX, stride=4)
    assert results.kills > 5
    assert_nothing_lost(results)
    assert_nothing_lost(kill_at_random(command_fixture, INDEX, 4, SEED))


@needs_mounts
def test_a_command_on_a_small_disk(command_fixture: CommandFixture) -> None:
    results = system.small_disks(command_fixture, INDEX, 2)
    assert_nothing_lost(results, 4)
    assert results.outcomes["refused"]


@needs_mounts
def test_a_command_without_shared_memory(command_fixture: CommandFixture) -> None:
    assert_nothing_lost(system.no_shared_memory(command_fixture, WORKERS, 1))


def test_a_command_that_may_not_read_or_write(command_fixture: CommandFixture) -> None:
    results = system.closed_folders(command_fixture, INDEX)
    assert results.outcomes == {"refused": 3}
    assert_nothing_lost(results)


def test_a_command_whose_clock_steps(command_fixture: CommandFixture) -> None:
    assert_nothing_lost(system.stepping_clocks(command_fixture, INDEX, 2, SEED))


def test_two_commands_for_one_target(command_fixture: CommandFixture) -> None:
    assert_nothing_lost(system.two_at_once(command_fixture, INDEX, 2, SEED))


def test_a_command_whose_worker_is_killed(command_fixture: CommandFixture) -> None:
    results = system.killed_workers(command_fixture, WORKERS, 1, SEED)
    assert results.kills
    assert_nothing_lost(results)


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


def test_a_folder_that_is_written_in_place_is_noticed(command_fixture: CommandFixture) -> None:
    results = AttemptResults("in place")
    attempt(
        command_fixture,
        INDEX,
        results,
        [Breaking("fm9g.data.prepare.index_builder.atomic_dir", folder_in_place, 10)],
        fresh=False,
    )
    assert "left neither old nor new" in results.problems[0]


def test_what_nobody_clears_away_is_noticed(command_fixture: CommandFixture) -> None:
    results = AttemptResults("left behind")
    with mock.patch.object(command_fixture, "input_state", {}):
        attempt(command_fixture, INDEX, results, [], fresh=True)
    assert "what it reads was changed" in results.problems[0]


# What the long test found, one by one


def test_a_line_of_figures_that_was_cut_off_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    for file in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / file).write_text('{"step": 1, "kind": "save", "text": ""}\n')
    with MetricsLogger(tmp_path, [], first_step=1, last_step=9) as metrics_logger:
        for file in ("metrics.jsonl", "events.jsonl"):
            with (tmp_path / file).open("a") as truncated:
                truncated.write('{"step": 2, "Lo')
        metrics_logger.log_metrics(3, {"Loss/train": 1.0})
        metrics_logger.log_event(3, "save", "written")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["step"] == 3


class Records(list[int]):
    """A dataset as the pool asks it."""

    used_bytes = 24.0


class Broken:
    """A pool one of whose processes was just killed."""

    _executor_manager_thread = None
    _max_workers = 1

    def submit(self, *_: object) -> None:
        raise BrokenProcessPool("A child process terminated abruptly")

    def shutdown(self, wait: bool) -> None: ...


def test_a_worker_that_is_killed_between_two_results_is_told_of(tmp_path: Path) -> None:
    pool: Any = Broken()
    source = DataSource(str(write_jsonl(tmp_path / "a.jsonl", make_records(1))), "jsonl")
    with pytest.raises(UserError, match="was killed"):
        list(convert_source(source, IndexConfig("en"), pool))
    encoding = EncodingPool.__new__(EncodingPool)
    encoding._pool, encoding.workers, encoding._max_chunk, encoding._status = pool, 1, 1, []
    encoding.mixture = cast(Any, SimpleNamespace(datasets=[Records(range(3))]))
    with pytest.raises(UserError, match="was killed"):
        list(encoding.tokenize(0, iter(range(3))))


def test_what_lies_beside_a_token_cache_that_is_whole_is_cleared_away(
    make_mixture: Callable[..., Path], tokenizer_path: Path, tmp_path: Path
) -> None:
    configs = load_mixture(make_mixture({"a": make_records(9)}))
    mixture = build_token_cache(Mixture(configs, str(tokenizer_path), 64, 3, 128, str(tmp_path / "cache")), 0)
    cache = mixture.cache_folder(0)
    shutil.copytree(cache, cache.with_name(f".{cache.name}.5.old"))  # a kill before the old one was deleted
    build_token_cache(mixture, 0)
    assert [folder.name for folder in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("skew", [-HOUR, HOUR])
def test_a_restart_knows_its_own_checkpoints_whatever_the_clocks_say(tmp_path: Path, skew: float) -> None:
    def save(step: int) -> None:
        empty: Any = type("Nothing", (list,), {"meta": {}})()
        folder = save_checkpoint(tmp_path, Snapshot(step, empty, None, None, {}, {}, {}, {}))
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time.time() + skew, time.time() + skew))

    save(7)  # of a run that is given up
    config, folders = TrainConfig(overwrite=True), RunFolders(tmp_path, tmp_path / "log", tmp_path / "tensorboard")
    rank_info = RankInfo(launcher="fm9g", start_time=time.time())
    assert find_resume_checkpoint(config, rank_info, folders) is None
    again = replace(rank_info, attempt=1)
    assert find_resume_checkpoint(config, again, folders) is None
    save(3)
    found = find_resume_checkpoint(config, again, folders)
    assert found is not None
    assert found.step == 3
    # Another run, which never came so far as to note its start.
    later = replace(again, start_time=rank_info.start_time + 1)
    assert find_resume_checkpoint(config, later, folders) is None


@pytest.mark.slow
def test_weights_and_their_configuration_get_their_names_one_right_after_the_other(
    full_fixture: CommandFixture,
) -> None:
    results = kill_at_every_change(full_fixture, "convert to .pt")
    assert_nothing_lost(results)
    assert results.outcomes[HALF] <= 6  # nothing but what clears away lies between


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("report", "plot")])
def test_every_command(full_fixture: CommandFixture, name: str) -> None:
    assert_nothing_lost(kill_at_every_change(full_fixture, name, stride=3))
    assert_nothing_lost(kill_at_random(full_fixture, name, 5, SEED))
    assert_nothing_lost(system.closed_folders(full_fixture, name))
    assert_nothing_lost(system.two_at_once(full_fixture, name, 2, SEED))
    if can_mount():
        assert_nothing_lost(system.small_disks(full_fixture, name, 3))


@pytest.mark.slow
def test_runs(runs: Runs) -> None:
    assert_nothing_lost(system.vanishing_checkpoints(runs, 4, SEED))
    assert_nothing_lost(system.looks_while_saving(runs, 8))
    assert_nothing_lost(system.runs_with_stepping_clocks(runs, 2, SEED))
    assert_nothing_lost(system.disturbed_runs(runs, "a worker is killed", 2, SEED, system.kill_worker, "killed"))
    if can_mount():
        assert_nothing_lost(system.full_logs(runs, 2, SEED))
        assert_nothing_lost(system.runs_without_shared_memory(runs, 1))
