"""Finds checkpoints by what a user types: a path, or a name in data/checkpoints such as RUN, RUN/STEP or RUN/best."""

from __future__ import annotations

from pathlib import Path

from fm9g.checkpoint.layout import BEST, LAST, MANIFEST, TENSOR_KINDS, file_name
from fm9g.checkpoint.steps import resolve_step
from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError
from fm9g.io.atomic import parse_temp_name
from fm9g.path_kind import CHECKPOINT, RUN, RUNS, check_kind
from fm9g.run_files import checkpoints_dir

CHECKPOINTS_DIR = checkpoints_dir()  # where names of runs are looked up


def resolve_checkpoint_path(path: Path) -> Path:
    """Resolves a path where a checkpoint may be given.

    Returns the first that exists: the path itself, that name in data/checkpoints, or the checkpoint that RUN/best or
    RUN/last stands for; else the path unchanged. Raises UserError if the run has no best or no last checkpoint.
    """
    for candidate in (path, CHECKPOINTS_DIR / path):
        if candidate.exists():
            return candidate
    if path.name not in (BEST, LAST):
        return path
    root = find_path(path.parent)
    return root / str(resolve_step(root, path.name))


def find_path(path: Path) -> Path:
    """An existing path or name in data/checkpoints. Raises a UserError that lists what exists instead."""
    leftovers = resolve_checkpoint_path(path)
    if leftovers.exists():  # a checkpoint is identified by the name of its folder, which `.` and links hide
        return leftovers if leftovers.name == leftovers.resolve().name else leftovers.resolve()
    for missing in (path, CHECKPOINTS_DIR / path):
        while not missing.parent.exists():
            missing = missing.parent
        name, folder = missing.name, missing.parent
        if steps := [step.name for step in list_checkpoints(folder)]:
            problem = f"{folder} has no checkpoint {name!r}; its steps: {', '.join(steps)}"
            raise UserError(f"{path}: {problem}{did_you_mean(name, steps)}")
        if runs := [run.name for run in _list_runs(folder)]:
            problem = f"there is no run {name!r} in {folder}; its runs: {', '.join(runs)}"
            raise UserError(f"{path}: {problem}{did_you_mean(name, runs)}")
    raise UserError(
        f"{path}: no such file or folder, and no run in {CHECKPOINTS_DIR}; give the folder of a run or a checkpoint"
    )


def find_runs(path: Path | None) -> list[Path]:
    """The run with that folder or name, or all runs in a folder. None: those in data/checkpoints."""
    if path is None and not CHECKPOINTS_DIR.is_dir():
        raise UserError(
            f"{CHECKPOINTS_DIR}: no such folder; run this beside data/, or give the folder of a run's checkpoints"
        )
    folder = CHECKPOINTS_DIR if path is None else find_path(path)
    if is_checkpoint(folder):
        raise UserError(f"{folder}: is one checkpoint; give the folder of its run, {folder.parent}")
    runs = [folder] if _is_run(folder) else _list_runs(folder)
    if not runs:
        raise UserError(f"{folder}: has neither checkpoints (folders named by their step) nor runs with checkpoints")
    return runs


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint with that folder or name, or all of a run. Raises UserError if there is none."""
    folder = find_path(path)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; only checkpoint folders have checksums. See fm9g ckpt show --weights")
    if steps := [folder] if is_checkpoint(folder) else list_checkpoints(folder):
        return steps
    check_kind(folder, CHECKPOINT, RUN, RUNS)
    runs = ", ".join(run.name for run in _list_runs(folder))
    reason = f"; it contains the runs {runs}: give one of them" if runs else f": no {MANIFEST}, nor folders with one"
    raise UserError(f"{folder}: not a checkpoint{reason}")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, perhaps one without its manifest; a run may be named by a number, too."""
    return (folder / MANIFEST).is_file() or (folder.name.isdecimal() and bool(tensor_files(folder)))


def _is_run(folder: Path) -> bool:
    return bool(list_checkpoints(folder) or stale_temp_dirs(folder))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones included, in order."""
    checkpoints = [step for step in folder.glob("*") if step.name.isdecimal() and is_checkpoint(step)]
    return sorted(checkpoints, key=lambda step: int(step.name))


def _list_runs(folder: Path) -> list[Path]:
    return sorted(filter(_is_run, folder.glob("*")))


def stale_temp_dirs(folder: Path) -> list[tuple[Path, str]]:
    """Temporary folders of unfinished saves, each with an explanation."""
    leftovers = []
    for leftover in sorted(folder.glob(".*")):
        name, kind = parse_temp_name(leftover)
        if kind in ("tmp", "old") and leftover.is_dir():
            content = "incomplete" if kind == "tmp" else f"the former {name}, moved aside"
            leftovers.append((leftover, f"{content}: a process is saving {name}, or ended before it had"))
    return leftovers


def tensor_files(folder: Path) -> dict[str, Path]:
    """The existing files of weights, optimizer and ema."""
    files = {kind: folder / file_name(folder.name, kind) for kind in TENSOR_KINDS}
    return {kind: file for kind, file in files.items() if file.is_file()}
