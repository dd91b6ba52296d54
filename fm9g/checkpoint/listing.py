"""Lists the checkpoints of a run without reading a tensor or importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.find import list_checkpoints, stale_temp_dirs, tensor_files
from fm9g.checkpoint.layout import MANIFEST
from fm9g.checkpoint.manifest import ProgressCallback, find_damaged_files, read_manifest
from fm9g.checkpoint.steps import best_step
from fm9g.errors import UserError


@dataclass(frozen=True)
class CheckpointInfo:
    """What a list of checkpoints says about one.

    Attributes:
        folder: its folder.
        written: time of writing, in seconds since 1970.
        size: bytes of all its files.
        tokens, loss, val_loss: None if unknown.
        contents: some of weights, optimizer, ema.
        problem: what is wrong, judged by the sizes of the files alone; empty: nothing.
    """

    folder: Path
    written: float
    size: int
    tokens: int | None
    loss: float | None
    val_loss: float | None
    contents: list[str]
    problem: str


@dataclass(frozen=True)
class RunInfo:
    """What a list of checkpoints says about a run.

    Attributes:
        folder: the folder of its checkpoints.
        checkpoints: in the order of steps.
        newest: the last undamaged one.
        best: the undamaged one with the lowest val_loss.
        leftovers: temporary folders of unfinished saves, each with an explanation.
    """

    folder: Path
    checkpoints: list[CheckpointInfo]
    newest: Path | None
    best: Path | None
    leftovers: list[tuple[Path, str]]


def inspect_run(folder: Path) -> RunInfo:
    """Every checkpoint of a run, damaged ones included."""
    infos = []
    for step in list_checkpoints(folder):
        with suppress(FileNotFoundError):  # a running training may be deleting it
            infos.append(_checkpoint_info(step))
    undamaged = [info for info in infos if not info.problem]
    best = best_step(folder)
    return RunInfo(
        folder=folder,
        checkpoints=infos,
        newest=undamaged[-1].folder if undamaged else None,
        best=None if best is None else folder / str(best),
        leftovers=stale_temp_dirs(folder),
    )


def _checkpoint_info(folder: Path) -> CheckpointInfo:
    problem = next((f"{name}: {problem}" for name, problem in find_problems(folder)), "")
    trainer_state: dict[str, Any] = {}
    if not problem:
        try:
            trainer_state = Checkpoint(folder, checksums=False, needs_optimizer=False).trainer_state()
        except UserError as error:
            problem = relative_message(folder, error)
    return CheckpointInfo(
        folder=folder,
        written=timestamp_of(folder),
        size=sum(map(file_size, list_files(folder))),
        tokens=tokens if isinstance(tokens := trainer_state.get("global_token_pass"), int) else None,
        loss=_number(trainer_state.get("loss")),
        val_loss=_number(trainer_state.get("val_loss")),
        contents=list(tensor_files(folder)),
        problem=problem,
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def list_files(path: Path) -> list[Path]:
    """All files below a folder; or the file itself."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def file_size(file: Path) -> int:
    return file.stat().st_size


def timestamp_of(path: Path) -> float:
    """When a checkpoint or a file was written, in seconds since 1970."""
    manifest = path / MANIFEST  # written last, and only once
    return (manifest if manifest.is_file() else path).stat().st_mtime


def find_problems(folder: Path, on_progress: ProgressCallback | None = None) -> Iterator[tuple[str, str]]:
    """The names of damaged files, each with what is wrong. on_progress: None compares only the sizes."""
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "is missing"
        return
    try:
        step, files = read_manifest(folder)
    except UserError as error:
        yield MANIFEST, relative_message(folder, error).removeprefix(f"{MANIFEST}: ")
        return
    if folder.name != str(step):
        yield MANIFEST, f"is that of step {step}; rename the folder to {step}"
    yield from find_damaged_files(folder, files, on_progress is not None, on_progress)


def relative_message(folder: Path, error: UserError) -> str:
    """The text of an error on one line, without the folder, which the reader knows."""
    return str(error).replace(f"{folder}/", "").replace("\n", "; ")
