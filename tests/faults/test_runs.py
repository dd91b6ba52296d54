"""Runs that are killed, and whose writes fail, end as if nothing had happened: see runs.py.

FM9G_FAULTS is the number of kills of the long test, FM9G_FAULT_SEED the seed of all: a failure names its own.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from faults.disks import can_mount
from faults.runs import (
    FAULT_KINDS,
    LAUNCH_MODES,
    FaultStats,
    LaunchMode,
    RunFixture,
    fail_writes_at_random,
    forget_to_sweep,
    kill_at_random,
    save_in_place,
)

from fm9g.checkpoint.manager import CheckpointManager
from fm9g.checkpoint.save import Snapshot
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir, atomic_file, check_writable, clean_stale_temps

pytestmark = pytest.mark.xdist_group("faults")  # they share the undisturbed runs, and the server of their processes
KILLS = int(os.environ.get("FM9G_FAULTS", 200))
SEED = int(os.environ.get("FM9G_FAULT_SEED", 1))
WITHOUT_DISK = tuple(kind for kind in FAULT_KINDS if kind != "disk")


@pytest.fixture(scope="module")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> RunFixture:
    return RunFixture(tmp_path_factory.mktemp("faults"), steps=4)


def assert_undisturbed(stats: FaultStats) -> None:
    assert not stats.problems, "\n\n".join(stats.problems)


@pytest.mark.parametrize(("launch_mode", "kills"), zip(LAUNCH_MODES, (3, 3, 1, 1)), ids=str)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    run_fixture: RunFixture, launch_mode: LaunchMode, kills: int
) -> None:
    stats = kill_at_random(run_fixture, launch_mode, kills, SEED)
    assert stats.kills == kills
    assert_undisturbed(stats)


def test_a_run_whose_writes_fail_ends_as_if_they_had_not(run_fixture: RunFixture) -> None:
    stats = fail_writes_at_random(run_fixture, LAUNCH_MODES[1], 3, SEED, WITHOUT_DISK)
    stats.add(fail_writes_at_random(run_fixture, LAUNCH_MODES[0], 3, SEED, WITHOUT_DISK))
    assert stats.faulty_launches == 6
    assert stats.failed_writes.total()
    assert_undisturbed(stats)


def test_a_disk_that_fills_up_and_is_freed_again(run_fixture: RunFixture) -> None:
    if not can_mount():
        pytest.skip("this user may not mount a small disk")
    assert_undisturbed(fail_writes_at_random(run_fixture, LAUNCH_MODES[1], 1, SEED, ["disk"]))


def disturb_badly(run_fixture: RunFixture, **overrides: Any) -> FaultStats:
    """One kill a run, until something is wrong."""
    return kill_at_random(
        run_fixture, LAUNCH_MODES[0], 8, SEED, max_per_run=1, saving_fraction=1, max_problems=1, **overrides
    )


def test_a_checkpoint_that_is_not_renamed_into_place_is_noticed(run_fixture: RunFixture) -> None:
    stats = disturb_badly(run_fixture, preexec_fn=save_in_place)
    assert any("a damaged checkpoint" in problem for problem in stats.problems), stats


def test_what_nobody_sweeps_is_noticed(run_fixture: RunFixture) -> None:
    stats = disturb_badly(run_fixture, preexec_fn=forget_to_sweep)
    assert any("left behind" in problem for problem in stats.problems), stats


def test_a_resume_that_is_not_exact_is_noticed(run_fixture: RunFixture) -> None:
    stats = disturb_badly(run_fixture, resume_no_optimze=True)
    assert any("is not that of the undisturbed run" in problem for problem in stats.problems), stats


# What the long test found, one by one


@pytest.mark.parametrize("good", range(3))
def test_what_the_system_said_is_not_hidden_by_what_torch_says_of_it(tmp_path: Path, good: int) -> None:
    class Quota(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes > good:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            return super().write(data)

    with (
        pytest.raises(UserError, match=r"file: cannot be written: Disk quota exceeded"),
        atomic_file(tmp_path / "file"),
    ):
        torch.save({"weight": torch.ones(2)}, Quota())
    assert not list(tmp_path.iterdir())


def test_a_probe_that_fails_at_its_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync_path(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fm9g.io.atomic.fsync_path", fsync_path)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_neither_be_replaced_nor_moved_back_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "folder", os.rename
    target.mkdir()
    (target / "file").write_text("before")

    def only_aside(source: Path, to: Path) -> None:
        if Path(to) == target:
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, to)

    monkeypatch.setattr(os, "rename", only_aside)
    with pytest.raises(UserError, match="Permission denied"), atomic_dir(target, overwrite=True):
        pass
    monkeypatch.undo()
    clean_stale_temps(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "file").read_text() == "before"


class NoTensors(list[tuple[str, torch.Tensor]]):
    """Tensors of a snapshot; there are none."""

    meta: ClassVar[dict[str, torch.Tensor]] = {}


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def atomic_rmtree(folder: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fm9g.checkpoint.manager.save_checkpoint", lambda root, snapshot: root)
    monkeypatch.setattr("fm9g.checkpoint.manager.atomic_rmtree", atomic_rmtree)
    events: list[tuple[int, str, str]] = []
    settings: Any = {
        "is_rank_zero": True,
        "async_save": False,
        "max_to_keep": 0,
        "obsolete_steps": [5],
        "abandoned_steps": [],
    }
    checkpoint_manager = CheckpointManager(tmp_path, on_event=lambda *event: events.append(event), **settings)
    checkpoint_manager.save(Snapshot(7, NoTensors(), None, None, {}, {}, {}, {}))
    assert [kind for _, kind, _ in events] == ["save", "prune_failed"]
    assert (checkpoint_manager.last_saved_step, checkpoint_manager.failure) == (7, "")


@pytest.mark.slow
@pytest.mark.parametrize("launch_mode", LAUNCH_MODES, ids=str)
def test_many_kills(tmp_path: Path, launch_mode: LaunchMode) -> None:
    stats = kill_at_random(RunFixture(tmp_path), launch_mode, KILLS // len(LAUNCH_MODES), SEED)
    assert_undisturbed(stats)
    assert stats.killed_while_saving > stats.kills / 5


@pytest.mark.slow
@pytest.mark.parametrize("launch_mode", LAUNCH_MODES, ids=str)
def test_many_failing_writes(tmp_path: Path, launch_mode: LaunchMode) -> None:
    kinds = FAULT_KINDS if can_mount() else WITHOUT_DISK
    stats = fail_writes_at_random(RunFixture(tmp_path), launch_mode, KILLS // 2 // len(LAUNCH_MODES), SEED, kinds)
    assert_undisturbed(stats)
