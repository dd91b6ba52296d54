"""Runs that are killed, and whose writes fail, end as if nothing had happened: see faults.py.

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
from train.faults import (
    KINDS,
    WAYS,
    Bed,
    Tally,
    Way,
    can_mount,
    fail_writes_at_random,
    forget_to_sweep,
    kill_at_random,
    save_in_place,
)

from fm9g.checkpoint.folder import Snapshot
from fm9g.checkpoint.saver import Saver
from fm9g.errors import UserError
from fm9g.files import new_file, new_folder, probe_writable, sweep

pytestmark = pytest.mark.xdist_group("faults")  # they share the undisturbed runs, and the server of their processes
KILLS = int(os.environ.get("FM9G_FAULTS", 200))
SEED = int(os.environ.get("FM9G_FAULT_SEED", 1))
WITHOUT_DISK = tuple(kind for kind in KINDS if kind != "disk")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("faults"), steps=4)


def assert_undisturbed(tally: Tally) -> None:
    assert not tally.problems, "\n\n".join(tally.problems)


@pytest.mark.parametrize(("way", "kills"), zip(WAYS, (3, 3, 1, 1)), ids=str)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(bed: Bed, way: Way, kills: int) -> None:
    tally = kill_at_random(bed, way, kills, SEED)
    assert tally.kills == kills
    assert_undisturbed(tally)


def test_a_run_whose_writes_fail_ends_as_if_they_had_not(bed: Bed) -> None:
    tally = fail_writes_at_random(bed, WAYS[1], 3, SEED, WITHOUT_DISK)
    tally.add(fail_writes_at_random(bed, WAYS[0], 3, SEED, WITHOUT_DISK))
    assert tally.faulty == 6
    assert tally.failed.total()
    assert_undisturbed(tally)


def test_a_disk_that_fills_up_and_is_freed_again(bed: Bed) -> None:
    if not can_mount():
        pytest.skip("this user may not mount a small disk")
    assert_undisturbed(fail_writes_at_random(bed, WAYS[1], 1, SEED, ["disk"]))


def disturb_badly(bed: Bed, **changes: Any) -> Tally:
    """One kill a run, until something is wrong."""
    return kill_at_random(bed, WAYS[0], 8, SEED, most=1, share_writing=1, enough=1, **changes)


def test_a_checkpoint_that_is_not_renamed_into_place_is_noticed(bed: Bed) -> None:
    tally = disturb_badly(bed, before=save_in_place)
    assert any("a damaged checkpoint" in problem for problem in tally.problems), tally


def test_what_nobody_sweeps_is_noticed(bed: Bed) -> None:
    tally = disturb_badly(bed, before=forget_to_sweep)
    assert any("left behind" in problem for problem in tally.problems), tally


def test_a_resume_that_is_not_exact_is_noticed(bed: Bed) -> None:
    tally = disturb_badly(bed, resume_no_optimze=True)
    assert any("is not that of the undisturbed run" in problem for problem in tally.problems), tally


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

    with pytest.raises(UserError, match=r"file: cannot be written: Disk quota exceeded"), new_file(tmp_path / "file"):
        torch.save({"weight": torch.ones(2)}, Quota())
    assert not list(tmp_path.iterdir())


def test_a_probe_that_fails_at_its_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fm9g.files.sync", sync)
    with pytest.raises(UserError, match="Permission denied"):
        probe_writable(tmp_path)
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
    with pytest.raises(UserError, match="Permission denied"), new_folder(target, overwrite=True):
        pass
    monkeypatch.undo()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "file").read_text() == "before"


class Nothing(list[tuple[str, torch.Tensor]]):
    """Tensors of a snapshot; there are none."""

    like: ClassVar[dict[str, torch.Tensor]] = {}


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_folder(folder: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fm9g.checkpoint.saver.save_checkpoint", lambda root, snapshot: root)
    monkeypatch.setattr("fm9g.checkpoint.saver.remove_folder", remove_folder)
    told: list[tuple[int, str, str]] = []
    settings: Any = {"first": True, "background": False, "limit": 0, "replaced": [5], "left": []}
    saver = Saver(tmp_path, told=lambda *event: told.append(event), **settings)
    saver.save(Snapshot(7, Nothing(), None, None, {}, {}, {}, {}))
    assert [kind for _, kind, _ in told] == ["save", "tidy_failed"]
    assert (saver.written, saver.failure) == (7, "")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_many_kills(tmp_path: Path, way: Way) -> None:
    tally = kill_at_random(Bed(tmp_path), way, KILLS // len(WAYS), SEED)
    assert_undisturbed(tally)
    assert tally.writing > tally.kills / 5


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_many_failing_writes(tmp_path: Path, way: Way) -> None:
    kinds = KINDS if can_mount() else WITHOUT_DISK
    tally = fail_writes_at_random(Bed(tmp_path), way, KILLS // 2 // len(WAYS), SEED, kinds)
    assert_undisturbed(tally)
