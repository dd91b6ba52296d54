"""The checkpoints of a run as a list: what is in their folders, told without reading a tensor, or importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.find import checkpoints_in, leftovers_in, tensor_files
from fm9g.checkpoint.folder import MANIFEST, Advance, Checkpoint, best_step, damaged_files, read_manifest
from fm9g.errors import UserError


@dataclass(frozen=True)
class Listed:
    """A row of a list of checkpoints.

    written: seconds since 1970. size: bytes. tokens, loss, val_loss: None where they are not known. holds: some of
    weights, optimizer, ema. damage: by the sizes of the files alone; empty: none.
    """

    folder: Path
    written: float
    size: int
    tokens: int | None
    loss: float | None
    val_loss: float | None
    holds: list[str]
    damage: str


@dataclass(frozen=True)
class Run:
    """The checkpoints of a run, in order. newest: the last whole one. best: the whole one of the least val_loss.
    leftovers: folders that a save which has not ended left, and whose they are."""

    folder: Path
    checkpoints: list[Listed]
    newest: Path | None
    best: Path | None
    leftovers: list[tuple[Path, str]]


def list_run(folder: Path) -> Run:
    """Every checkpoint of a run, whole or not; none of their tensors is read."""
    listed = []
    for step in checkpoints_in(folder):
        with suppress(FileNotFoundError):  # a run that goes on may be deleting it
            listed.append(_listed(step))
    whole = [item for item in listed if not item.damage]
    best = best_step(folder)
    return Run(
        folder=folder,
        checkpoints=listed,
        newest=whole[-1].folder if whole else None,
        best=None if best is None else folder / str(best),
        leftovers=leftovers_in(folder),
    )


def _listed(folder: Path) -> Listed:
    damage = next((f"{name}: {damage}" for name, damage in damages_in(folder)), "")
    counts: dict[str, Any] = {}
    if not damage:
        try:
            counts = Checkpoint(folder, checksums=False, needs_optimizer=False).counts()
        except UserError as error:
            damage = within(folder, error)
    return Listed(
        folder=folder,
        written=written_at(folder),
        size=sum(map(size_of, files_in(folder))),
        tokens=tokens if isinstance(tokens := counts.get("global_token_pass"), int) else None,
        loss=_number(counts.get("loss")),
        val_loss=_number(counts.get("val_loss")),
        holds=list(tensor_files(folder)),
        damage=damage,
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def files_in(path: Path) -> list[Path]:
    """All below a folder; or the file itself."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def size_of(file: Path) -> int:
    return file.stat().st_size


def written_at(path: Path) -> float:
    manifest = path / MANIFEST  # written last, and only once
    return (manifest if manifest.is_file() else path).stat().st_mtime


def damages_in(folder: Path, advance: Advance | None = None) -> Iterator[tuple[str, str]]:
    """The names of damaged files, and what is wrong. advance: None: the sizes alone are compared."""
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "is missing"
        return
    try:
        step, files = read_manifest(folder)
    except UserError as error:
        yield MANIFEST, within(folder, error).removeprefix(f"{MANIFEST}: ")
        return
    if folder.name != str(step):
        yield MANIFEST, f"is that of step {step}; give the folder its name back"
    yield from damaged_files(folder, files, advance is not None, advance)


def within(folder: Path, error: UserError) -> str:
    """An error's text without the folder, which the reader knows, on one line."""
    return str(error).replace(f"{folder}/", "").replace("\n", "; ")
