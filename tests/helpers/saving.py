"""A model of one weight, and the manager that saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.manager import CheckpointManager
from fm9g.checkpoint.save import Snapshot
from fm9g.engine.gather import GatheredStateDict, GatherSpec


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
