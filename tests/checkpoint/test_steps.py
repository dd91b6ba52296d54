"""Which checkpoints a run has, and which one it resumes from."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.saving import Model, make_manager

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.listing import inspect_run
from fm9g.checkpoint.steps import best_step, last_step, latest_checkpoint, list_steps, mark_abandoned
from fm9g.errors import UserError


def test_auto_takes_the_newest_that_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_checkpoint(tmp_path) is None
    manager, _ = make_manager(tmp_path)
    for step in (1, 2, 10):
        manager.save(Model().snapshot(step))
    file = Checkpoint(tmp_path / "10").weight_file
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    [warning] = caplog.messages
    assert "its content has changed" in warning
    caplog.clear()
    (tmp_path / "2").rename(tmp_path / "0002")  # no step is called so
    (tmp_path / "11").mkdir()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert [message.partition(":")[0] for message in caplog.messages[:2]] == [
        str(tmp_path / "0002"),
        str(tmp_path / "11"),
    ]
    (tmp_path / "0002").rename(tmp_path / "2")
    for step in (1, 2):
        (tmp_path / str(step) / "data_position.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged; --overwrite true starts the run anew"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["abandoned", "left"])
def test_abandoned_checkpoints_of_every_version_are_neither_listed_nor_kept_nor_resumed(
    suffix: str, tmp_path: Path
) -> None:
    model = Model()
    for step in (2, 4, 6):
        make_manager(tmp_path)[0].save(model.snapshot(step, val_loss=1 / step))
    (tmp_path / "6").rename(tmp_path / f"6.{suffix}")
    assert list_steps(tmp_path) == [2, 4]
    assert [info.folder.name for info in inspect_run(tmp_path).checkpoints] == ["2", "4"]
    assert (last_step(tmp_path), best_step(tmp_path)) == (4, 4)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 4
    make_manager(tmp_path, max_to_keep=1)[0].save(model.snapshot(7, val_loss=0.1))
    assert {folder.name for folder in tmp_path.iterdir()} == {"7", f"6.{suffix}"}
    make_manager(tmp_path)[0].save(model.snapshot(6))
    mark_abandoned(tmp_path, [6])  # replaces the earlier one
    assert {folder.name for folder in tmp_path.iterdir()} == {"7", "6.abandoned"}
