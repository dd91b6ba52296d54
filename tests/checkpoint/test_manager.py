"""Saving one checkpoint after the other: in the background, within a limit, whatever goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.saving import Model, make_manager

import fm9g.checkpoint.manager
from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.save import Snapshot
from fm9g.checkpoint.steps import best_step, list_steps, mark_abandoned


def value(root: Path, step: int) -> float:
    return Checkpoint(root / str(step)).weights()["w"][0, 0].item()


def test_in_the_background_a_checkpoint_holds_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, may_write = Model(), threading.Event()
    write = fm9g.checkpoint.manager.save_checkpoint
    monkeypatch.setattr(fm9g.checkpoint.manager, "save_checkpoint", lambda *given: may_write.wait(30) and write(*given))
    manager, events = make_manager(tmp_path, async_save=True)
    model.weight.fill_(1.0)
    manager.save(model.snapshot(1))
    model.weight.fill_(2.0)  # training goes on while nothing is written yet
    assert list_steps(tmp_path) == []
    may_write.set()
    manager.save(model.snapshot(2))  # waits for the first
    assert list_steps(tmp_path)[0] == 1
    manager.wait()
    assert [value(tmp_path, 1), value(tmp_path, 2)] == [1.0, 2.0]
    assert [event[:2] for event in events] == [(1, "save"), (2, "save")]


def test_the_limit_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    model = Model()
    manager, _ = make_manager(tmp_path, max_to_keep=2)
    for step, loss in enumerate([5.0, 2.0, 3.0, None, 4.0], 1):
        manager.save(model.snapshot(step, loss))
        assert (loss is None) or best_step(tmp_path) == (1 if step == 1 else 2)
    assert list_steps(tmp_path) == [2, 5]
    manager, _ = make_manager(tmp_path, max_to_keep=1)
    manager.save(model.snapshot(6, 9.0))
    assert list_steps(tmp_path) == [2, 6]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_what_another_run_left_goes_when_this_one_has_something(tmp_path: Path) -> None:
    model = Model()
    for step in (3, 7, 9):
        make_manager(tmp_path)[0].save(model.snapshot(step))
    model.weight.fill_(1.0)
    manager, _ = make_manager(tmp_path, obsolete_steps=[3, 7, 9])
    assert list_steps(tmp_path) == [3, 7, 9]
    manager.save(model.snapshot(7))
    assert list_steps(tmp_path) == [7]
    assert value(tmp_path, 7) == 1.0


def test_a_course_that_is_left_is_set_aside_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    for step in (2, 4, 6):
        make_manager(tmp_path)[0].save(model.snapshot(step))
    model.weight.fill_(1.0)
    manager, _ = make_manager(tmp_path, abandoned_steps=[4, 6])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _full)
        manager.save(model.snapshot(3))
    assert list_steps(tmp_path) == [2]  # what a restart goes on from
    mark_abandoned(tmp_path, [4, 6])  # again, after an attempt that came half-way
    manager.save(model.snapshot(4))
    assert {folder.name for folder in tmp_path.iterdir()} == {"2", "4", "4.abandoned", "6.abandoned"}
    make_manager(tmp_path, abandoned_steps=[4])[0].save(model.snapshot(3))
    assert {folder.name for folder in tmp_path.iterdir()} == {"2", "3", "4.abandoned", "6.abandoned"}
    assert torch.load(next((tmp_path / "4.abandoned").glob("*.pt")), weights_only=True)["w"][0, 0] == 1.0


@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_write_is_told_and_the_next_one_counts(
    tmp_path: Path, async_save: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    manager, events = make_manager(tmp_path, async_save=async_save)
    manager.save(model.snapshot(1))
    manager.wait()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", _full)
        manager.save(model.snapshot(2))
        manager.wait()
    assert manager.last_saved_step == 1
    assert "the disk is full" in manager.failure
    assert events[-1][:2] == (2, "save_failed")
    assert f"the last complete one is {tmp_path / '1'}" in events[-1][2]
    assert [folder.name for folder in tmp_path.iterdir()] == ["1"]
    manager.save(model.snapshot(3))
    manager.wait()
    assert (manager.last_saved_step, manager.failure) == (3, "")


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_whatever_becomes_of_a_write_all_that_others_send_is_taken(tmp_path: Path) -> None:
    taken = []

    class Sent:
        def __init__(self) -> None:
            self.meta = {"a": torch.empty(1, device="meta"), "b": torch.empty(2, device="meta")}

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self.meta.items():
                taken.append(name)
                yield name, torch.zeros(2 if name == "a" else tensor.shape[0])  # the first has a wrong shape

    snapshot = Snapshot(1, Sent(), Sent(), None, {}, {}, {}, {})
    (tmp_path / "1").write_text("in the way")
    manager, _ = make_manager(tmp_path)
    manager.save(snapshot)
    assert "a file is in the way" in manager.failure
    assert taken == ["a", "b", "a", "b"]
    taken.clear()
    make_manager(tmp_path, is_rank_zero=False)[0].save(snapshot)
    assert taken == ["a", "b", "a", "b"]


def test_a_bug_in_the_thread_reaches_the_one_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fm9g.checkpoint.manager, "save_checkpoint", lambda *_: 1 / 0)
    manager, _ = make_manager(tmp_path, async_save=True)
    manager.save(Model().snapshot(1))
    with pytest.raises(ZeroDivisionError):
        manager.wait()
