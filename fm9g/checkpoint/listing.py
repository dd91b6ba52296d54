"""The checkpoints of a run as a list: what is in their folders, told without reading a tensor, or importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import (
    MANIFEST,
    Checkpoint,
    ProgressCallback,
    best_step,
    find_damaged_files,
    read_manifest,
)
from fm9g.checkpoint.find import list_checkpoints, stale_temp_dirs, tensor_files
from fm9g.errors import UserError


@dataclass(frozen=True)
class CheckpointInfo:
    """A row of a list of checkpoints.

    written: seconds since 1970. size: bytes. tokens, loss, val_loss: None where they are not known. contents: some of
    weights, optimizer, ema. problem: by the sizes of the files alone; empty: none.
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
    """The checkpoints of a run, in order. newest: the last whole one. best: the whole one of the least val_loss.
    leftovers: folders that a save which has not ended left, and whose they are."""

    folder: Path
    checkpoints: list[CheckpointInfo]
    newest: Path | None
    best: Path | None
    leftovers: list[tuple[Path, str]]


def inspect_run(folder: Path) -> RunInfo:
    """Every checkpoint of a run, whole or not; none of their tensors is read."""
    listed = []
    for step in list_checkpoints(folder):
        with suppress(FileNotFoundError):  # a run that goes on may be deleting it
            listed.append(_checkpoint_info(step))
    whole = [item for item in listed if not item.problem]
    best = best_step(folder)
    return RunInfo(
        folder=folder,
        checkpoints=listed,
        newest=whole[-1].folder if whole else None,
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
    """All below a folder; or the file itself."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def file_size(file: Path) -> int:
    return file.stat().st_size


def timestamp_of(path: Path) -> float:
    manifest = path / MANIFEST  # written last, and only once
    return (manifest if manifest.is_file() else path).stat().st_mtime


def find_problems(folder: Path, on_progress: ProgressCallback | None = None) -> Iterator[tuple[str, str]]:
    """The names of damaged files, and what is wrong. on_progress: None: the sizes alone are compared."""
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "is missing"
        return
    try:
        step, files = read_manifest(folder)
    except UserError as error:
        yield MANIFEST, relative_message(folder, error).removeprefix(f"{MANIFEST}: ")
        return
    if folder.name != str(step):
        yield MANIFEST, f"is that of step {step}; give the folder its name back"
    yield from find_damaged_files(folder, files, on_progress is not None, on_progress)


def relative_message(folder: Path, error: UserError) -> str:
    """An error's text without the folder, which the reader knows, on one line."""
    return str(error).replace(f"{folder}/", "").replace("\n", "; ")
