"""Checkpoints by what a user types: a path, or a name below data/checkpoints, RUN/best or RUN/last; whole or not."""

from __future__ import annotations

import re
from pathlib import Path

from fm9g.checkpoint.checkpoint import BEST, LAST, MANIFEST, file_name, resolve_step
from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError
from fm9g.io.path_kind import CHECKPOINT, RUN, RUNS, check_kind

CHECKPOINTS_DIR = Path("data") / "checkpoints"  # where a run's name is looked for
_TENSOR_KINDS = {"weights": "weights", "optimizer": "optimizer", "ema": "ema"}  # as shown, and as Snapshot calls them
_STALE_TEMP = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)")  # as fm9g.io.atomic names them


def resolve_checkpoint_path(path: Path) -> Path:
    """What a path means where a checkpoint may be given: itself where it is there, else what data/checkpoints has of
    that name, else the checkpoint that RUN/best or RUN/last stands for. A path to nothing stays as it is.

    Raises UserError where a run has no best or no last checkpoint.
    """
    for there in (path, CHECKPOINTS_DIR / path):
        if there.exists():
            return there
    if path.name not in (BEST, LAST):
        return path
    root = find_path(path.parent)
    return root / str(resolve_step(root, path.name))


def find_path(path: Path) -> Path:
    """What a path, or a path below data/checkpoints, names. Raises UserError that lists what is there instead."""
    there = resolve_checkpoint_path(path)
    if there.exists():  # a checkpoint is known by the name of its folder: `.` and links say less
        return there if there.name == there.resolve().name else there.resolve()
    for missing in (path, CHECKPOINTS_DIR / path):
        while not missing.parent.exists():
            missing = missing.parent
        name, folder = missing.name, missing.parent
        if steps := [step.name for step in list_checkpoints(folder)]:
            found = f"{folder} has no checkpoint {name!r}; its steps: {', '.join(steps)}"
            raise UserError(f"{path}: {found}{did_you_mean(name, steps)}")
        if runs := [run.name for run in _list_runs(folder)]:
            found = f"there is no run {name!r} in {folder}; its runs: {', '.join(runs)}"
            raise UserError(f"{path}: {found}{did_you_mean(name, runs)}")
    raise UserError(
        f"{path}: no such file or folder, and no run in {CHECKPOINTS_DIR}; give the folder of a run or a checkpoint"
    )


def find_runs(path: Path | None) -> list[Path]:
    """The run of that folder or name, or all runs of a folder of runs. None: those of data/checkpoints."""
    if path is None and not CHECKPOINTS_DIR.is_dir():
        raise UserError(
            f"{CHECKPOINTS_DIR}: no such folder; run this beside data/, or give the folder of a run's checkpoints"
        )
    folder = CHECKPOINTS_DIR if path is None else find_path(path)
    if is_checkpoint(folder):
        raise UserError(f"{folder}: one checkpoint; give the folder of its run, {folder.parent}")
    runs = [folder] if _is_run(folder) else _list_runs(folder)
    if not runs:
        raise UserError(f"{folder}: holds no checkpoints (folders named by their step), nor runs with some")
    return runs


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint of that folder, or all of a run. Raises UserError where there is none."""
    folder = find_path(path)
    if folder.is_file():
        raise UserError(f"{folder}: a file; only checkpoint folders have checksums. See fm9g ckpt show --weights")
    if steps := [folder] if is_checkpoint(folder) else list_checkpoints(folder):
        return steps
    check_kind(folder, CHECKPOINT, RUN, RUNS)
    runs = ", ".join(run.name for run in _list_runs(folder))
    more = f"; it holds the runs {runs}: give one of them" if runs else f": neither {MANIFEST} nor folders with one"
    raise UserError(f"{folder}: not a checkpoint{more}")


def is_checkpoint(folder: Path) -> bool:
    """Also a damaged one without its manifest, but not a run that is called by a number."""
    return (folder / MANIFEST).is_file() or (folder.name.isdecimal() and bool(tensor_files(folder)))


def _is_run(folder: Path) -> bool:
    return bool(list_checkpoints(folder) or stale_temp_dirs(folder))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in order."""
    found = [step for step in folder.glob("*") if step.name.isdecimal() and is_checkpoint(step)]
    return sorted(found, key=lambda step: int(step.name))


def _list_runs(folder: Path) -> list[Path]:
    return sorted(filter(_is_run, folder.glob("*")))


def stale_temp_dirs(folder: Path) -> list[tuple[Path, str]]:
    """Folders that a save which has not ended left, and whose they are."""
    found = []
    for leftover in sorted(folder.glob(".*")):
        match = _STALE_TEMP.fullmatch(leftover.name)
        if match and leftover.is_dir():
            name, kind = match["name"], match["kind"]
            what = "unfinished" if kind == "tmp" else f"the old {name}, moved aside"
            found.append((leftover, f"{what}: a process is writing {name}, or ended before it had"))
    return found


def tensor_files(folder: Path) -> dict[str, Path]:
    """weights, optimizer and ema: those of them that are there."""
    files = {shown: folder / file_name(folder.name, kind) for shown, kind in _TENSOR_KINDS.items()}
    return {shown: file for shown, file in files.items() if file.is_file()}
