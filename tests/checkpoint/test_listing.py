"""What a list of checkpoints says about each."""

from __future__ import annotations

import math
import os

from helpers.checkpoints import (
    save,
)

from fm9g.checkpoint.layout import MANIFEST
from fm9g.checkpoint.listing import inspect_run


def test_ls_counts_every_file_and_tells_the_time_of_writing() -> None:
    folder = save("m", 5)
    os.utime(folder / MANIFEST, (1e9, 1e9))
    [item] = inspect_run(folder.parent).checkpoints
    assert item.size == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert (item.written, item.tokens, item.loss, item.val_loss) == (1e9, 5000, None, None)


def test_a_loss_that_is_not_a_number_is_not_the_best() -> None:
    save("m", 1, val_loss=math.nan)
    second = save("m", 2, val_loss=9.0)
    assert inspect_run(second.parent).best == second
