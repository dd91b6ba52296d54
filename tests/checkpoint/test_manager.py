"""Checkpoints written one after the other: beside the training, within a limit, whatever goes wrong."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fm9g.checkpoint.manager
from fm9g.checkpoint.checkpoint import Checkpoint, Snapshot, best_step, latest_checkpoint, list_steps, mark_abandoned
from fm9g.checkpoint.manager import CheckpointManager
from fm9g.engine.gather import GatheredStateDict, GatherSpec
from fm9g.errors import UserError
from fm9g.io.weights import write_weights


class Model:
    """One weight that changes in place, as an engine's do."""

    def __init__(self) -> None:
        self.weight = torch.zeros(3, 4)

    def collected(self) -> GatheredStateDict:
        spec = GatherSpec(self.weight.shape, lambda whole: whole, True, lambda: self.weight)
        return GatheredStateDict({"w": spec}, torch.device("cpu"), 1, None)

    def snapshot(self, step: int, val_loss: float | None = None) -> Snapshot:
        return Snapshot(step, self.collected(), None, None, {}, {"iteration": step, "val_loss": val_loss}, {}, {})


def make_manager(root: Path, **changes: Any) -> tuple[CheckpointManager, list[tuple[int, str, str]]]:
    events: list[tuple[int, str, str]] = []
    settings = {
        "is_rank_zero": True,
        "async_save": False,
        "max_to_keep": 0,
        "obsolete_steps": [],
        "abandoned_steps": [],
    } | changes
    return CheckpointManager(root, on_event=lambda *event: events.append(event), **settings), events


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


def test_files_have_the_checksums_that_torch_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(700, 3), "none": torch.zeros(0, 2), "b": torch.arange(5)}
    write_weights(tmp_path / "ours.pt", weights, reversed(weights.items()))
    torch.save(weights, tmp_path / "theirs.pt")
    sums = []
    for name in ("ours", "theirs"):
        with zipfile.ZipFile(tmp_path / f"{name}.pt") as archive:
            assert archive.testzip() is None
            sums.append([record.CRC for record in archive.infolist() if "/data/" in record.filename])
            assert len(set(sums[-1])) == 3
    assert sums[0] == sums[1]
    assert all(torch.equal(value, weights[name]) for name, value in torch.load(tmp_path / "ours.pt").items())


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
    assert {folder.name for folder in tmp_path.iterdir()} == {"2", "4", "4.left", "6.left"}
    make_manager(tmp_path, abandoned_steps=[4])[0].save(model.snapshot(3))
    assert {folder.name for folder in tmp_path.iterdir()} == {"2", "3", "4.left", "6.left"}
    assert torch.load(next((tmp_path / "4.left").glob("*.pt")), weights_only=True)["w"][0, 0] == 1.0


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
    assert f"the last good one is {tmp_path / '1'}" in events[-1][2]
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


def test_auto_takes_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == (None, [])
    manager, _ = make_manager(tmp_path)
    for step in (1, 2, 10):
        manager.save(Model().snapshot(step))
    file = Checkpoint(tmp_path / "10").weight_file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    checkpoint, notes = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(notes) == 1
    assert "its content has changed" in notes[0]
    (tmp_path / "2").rename(tmp_path / "0002")  # no step is called so
    (tmp_path / "11").mkdir()
    checkpoint, notes = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert [note.partition(":")[0] for note in notes[:2]] == [str(tmp_path / "0002"), str(tmp_path / "11")]
    (tmp_path / "0002").rename(tmp_path / "2")
    for step in (1, 2):
        (tmp_path / str(step) / "data_position.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole; --overwrite true starts anew"):
        latest_checkpoint(tmp_path)
