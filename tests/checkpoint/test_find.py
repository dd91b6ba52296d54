"""Checkpoints are found by path, by name, from inside and by a link."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.checkpoints import (
    save,
)

from fm9g.checkpoint.find import CHECKPOINTS_DIR, find_runs
from fm9g.checkpoint.inspect import describe
from fm9g.errors import UserError


def test_a_run_may_be_called_by_a_number() -> None:
    save("2024", 1)
    assert [run.name for run in find_runs(None)] == ["2024"]
    with pytest.raises(UserError, match="is one checkpoint; give the folder of its run"):
        find_runs(CHECKPOINTS_DIR / "2024" / "1")


def test_a_checkpoint_may_be_named_from_inside_or_by_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("m", 12)
    Path("latest").symlink_to(folder)
    assert describe(Path("latest"))["step"] == 12
    monkeypatch.chdir(folder)
    assert describe(Path("."))["step"] == 12
