"""Runs that are killed, and whose writes fail, end as if nothing had happened: see faults.py.

FM9G_FAULTS is the number of kills of the long test, FM9G_FAULT_SEED the seed of all: a failure names its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
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

pytestmark = pytest.mark.xdist_group(
    "faults"
)  # they share the undisturbed runs, and the server that processes are forked from
KILLS = int(os.environ.get("FM9G_FAULTS", 200))
SEED = int(os.environ.get("FM9G_FAULT_SEED", 1))
WITHOUT_DISK = tuple(kind for kind in KINDS if kind != "disk")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("faults"), steps=6)


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


def test_a_checkpoint_that_is_not_renamed_into_place_is_noticed(bed: Bed) -> None:
    tally = kill_at_random(bed, WAYS[0], 4, SEED, share_writing=1, before=save_in_place)
    assert any("a damaged checkpoint" in problem for problem in tally.problems), tally


def test_what_nobody_sweeps_is_noticed(bed: Bed) -> None:
    tally = kill_at_random(bed, WAYS[0], 4, SEED, share_writing=1, before=forget_to_sweep)
    assert any("left behind" in problem for problem in tally.problems), tally


def test_a_resume_that_is_not_exact_is_noticed(bed: Bed) -> None:
    tally = kill_at_random(bed, WAYS[0], 2, SEED, share_writing=1, resume_no_optimze=True)
    assert any("is not that of the undisturbed run" in problem for problem in tally.problems), tally


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
