"""The checkpoints of a run: which there are, which one to resume from, which ones to abandon."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import BEST, LAST, MANIFEST, abandoned_paths, is_step_name
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_rmtree
from fm9g.io.os_errors import as_user_error

logger = logging.getLogger(__name__)


def list_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, in order, without unfinished and abandoned ones."""
    if not root.is_dir():
        return []
    return sorted(
        int(folder.name) for folder in root.iterdir() if is_step_name(folder.name) and (folder / MANIFEST).is_file()
    )


def last_step(root: Path) -> int | None:
    """The newest step whose files all have the right size; None if there is none."""
    return next((step for step in reversed(list_steps(root)) if _trainer_state(root / str(step)) is not None), None)


def best_step(root: Path) -> int | None:
    """The step of the checkpoint with the lowest validation loss; None if none was evaluated."""
    losses = {step: (_trainer_state(root / str(step)) or {}).get("val_loss") for step in list_steps(root)}
    known = {step: loss for step, loss in losses.items() if isinstance(loss, (int, float)) and math.isfinite(loss)}
    return min(known, key=lambda step: known[step]) if known else None


def resolve_step(root: Path, name: str) -> int:
    """The step that the name `best` or `last` stands for. Raises UserError if there is none."""
    steps = list_steps(root)
    if not steps:
        raise UserError(f"{root}: has no checkpoint, so there is no {name} one")
    step = best_step(root) if name == BEST else last_step(root)
    if step is not None:
        return step
    listed = f"its steps: {', '.join(map(str, steps))}"
    if name == LAST or last_step(root) is None:
        raise UserError(f"{root}: every checkpoint is damaged (`fm9g ckpt ls` says how); {listed}")
    raise UserError(
        f"{root}: no checkpoint has a validation loss, so none is the best; {listed}. A run with val_dataset saves one "
        "at steps that are multiples of both eval_iters and save_iters"
    )


def open_checkpoint(root: Path, step: int, needs_optimizer: bool = True) -> Checkpoint:
    """The checkpoint of a step. Raises a UserError that lists the existing ones."""
    steps = list_steps(root)
    if step not in steps:
        raise UserError(f"{root}: no checkpoint of step {step}; there are: {', '.join(map(str, steps)) or 'none'}")
    return Checkpoint(root / str(step), needs_optimizer=needs_optimizer)


def latest_checkpoint(
    root: Path, ignored: Mapping[str, Any] | None = None, needs_optimizer: bool = True
) -> Checkpoint | None:
    """The newest undamaged checkpoint. Logs a warning for each newer one that it skips.

    Args:
        root: the folder of the run's checkpoints.
        ignored: an earlier result of `checkpoint_ids`; these checkpoints do not count, damaged or not.
        needs_optimizer: see Checkpoint.

    Raises UserError if there are checkpoints and all are damaged, unless `ignored` is given.
    """
    problems = _invalid_folders(root)
    for step in reversed(list_steps(root)):
        if ignored and ignored.get(str(step)) == _checkpoint_id(root / str(step)):
            continue
        try:
            checkpoint = Checkpoint(root / str(step), needs_optimizer=needs_optimizer)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning(problem)
        return checkpoint
    if list_steps(root) and problems and ignored is None:
        raise UserError(*problems, f"{root}: every checkpoint is damaged; --overwrite true starts the run anew")
    return None


def _invalid_folders(root: Path) -> list[str]:
    """A line for each folder that is named by a number but is not a checkpoint."""
    folders = [each for each in sorted(root.iterdir()) if each.is_dir()] if root.is_dir() else []
    return [
        f"{folder}: skipped: {MANIFEST} is missing, or its name is not that of a step"
        for folder in folders
        if folder.name.isdecimal() and not (is_step_name(folder.name) and (folder / MANIFEST).is_file())
    ]


def checkpoint_ids(root: Path) -> dict[str, Any]:
    """Identifies the checkpoints of a run, as JSON by step, to tell them from later ones with the same names.

    Times are not compared with the current time: the clocks of a machine and of its files may differ, and jump.
    """
    return {str(step): _checkpoint_id(root / str(step)) for step in list_steps(root)}


def mark_abandoned(root: Path, steps: list[int]) -> None:
    """Renames checkpoints to STEP.abandoned, so that no run resumes from them, and replaces earlier abandoned ones.

    Safe to repeat after a failure: renamed checkpoints are skipped. Raises UserError if renaming fails.
    """
    for step in steps:
        folder, (abandoned, *former) = root / str(step), abandoned_paths(root, step)
        if not folder.exists():
            continue
        try:
            for earlier in (abandoned, *former):
                if earlier.exists():
                    atomic_rmtree(earlier)
            folder.rename(abandoned)
        except OSError as error:
            raise as_user_error(error, abandoned) from error


def _trainer_state(folder: Path) -> dict[str, Any] | None:
    """The trainer state of a checkpoint; None if it is damaged, or just being deleted."""
    try:
        return Checkpoint(folder, checksums=False, needs_optimizer=False).trainer_state()
    except UserError:
        return None


def _checkpoint_id(folder: Path) -> list[int]:
    status = (folder / MANIFEST).stat()
    return [status.st_ino, status.st_mtime_ns]
