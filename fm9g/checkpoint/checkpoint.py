"""A checkpoint: a folder `<step>` with weights, optimizer state, data position and what describes them.

It is written under a temporary name, with size and CRC-32 of every file in manifest.json, and renamed when whole.
Checkpoints are opened by their step or found by a path or a run's name.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fm9g.config.load import read_json, read_object
from fm9g.config.run import with_current_keys
from fm9g.errors import UserError
from fm9g.io.atomic import as_user_error, atomic_dir, atomic_rmtree

if TYPE_CHECKING:  # steps and manifests are read without torch
    import torch

MANIFEST, LOADER_STATE, MODEL_CONFIG, TOKENIZER = "manifest.json", "data_position.json", "config.json", "tokenizer"
RUN_CONFIG = "run_config.json"
BEST, LAST = "best", "last"  # the checkpoints of a run that can be named so
_SUFFIXES = {"weights": ".pt", "optimizer": ".rank-0.opt", "ema": ".ema.pt", "trainer_state": ".log_ckpt"}

ProgressCallback = Callable[[int], None]  # told of so many bytes more that are done


def file_name(step: int | str, kind: str) -> str:
    """Of a checkpoint's file. kind: weights, optimizer, ema (all three: tensors), or trainer_state."""
    return f"fm9g_live_checkpoint-{step}{_SUFFIXES[kind]}"


class Tensors(Protocol):
    """Whole tensors that come one at a time. meta: a tensor of the shape and type of each, on the meta device."""

    @property
    def meta(self) -> Mapping[str, torch.Tensor]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    weights, optimizer, ema: as an engine gives them; optimizer and ema may be None. loader_state: as the loader gives
    it. trainer_state: iteration, global_token_pass, global_total_task_token, and what else is known of the run.
    json_files: file name -> JSON content. tokenizer_files: file name -> a file to copy, or text.
    """

    step: int
    weights: Tensors
    optimizer: Tensors | None
    ema: Tensors | None
    loader_state: dict[str, Any]
    trainer_state: dict[str, Any]
    json_files: dict[str, Any]
    tokenizer_files: dict[str, Path | str]

    def tensors(self) -> dict[str, Any]:
        """Those of weights, optimizer and ema that there are."""
        found = {"weights": self.weights, "optimizer": self.optimizer, "ema": self.ema}
        return {kind: tensors for kind, tensors in found.items() if tensors is not None}


def save_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Writes root/<step>, in place of one that is there. Raises UserError for a full disk, which changes nothing."""
    from fm9g.io.weights import write_weights

    step = snapshot.step
    target = root / str(step)
    with atomic_dir(target, overwrite=True) as folder:
        for kind, tensors in snapshot.tensors().items():
            write_weights(folder / file_name(step, kind), tensors.meta, tensors)
        json_files = {
            file_name(step, "trainer_state"): snapshot.trainer_state,
            LOADER_STATE: snapshot.loader_state,
            **snapshot.json_files,
        }
        for name, content in json_files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        (folder / TOKENIZER).mkdir()
        for name, content in snapshot.tokenizer_files.items():
            file = folder / TOKENIZER / name
            file.parent.mkdir(exist_ok=True)  # additional_chat_templates/
            if isinstance(content, Path):
                shutil.copyfile(content, file)
            else:
                file.write_text(content, encoding="utf-8")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sums = {str(file.relative_to(folder)): [file.stat().st_size, checksum(file)] for file in files}
        manifest = {"step": step, "files": sums}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return target


class Checkpoint:
    """An existing checkpoint; opening it compares every file's size and checksum with the manifest."""

    def __init__(self, folder: Path, checksums: bool = True, needs_optimizer: bool = True) -> None:
        """checksums: False compares the sizes alone, without reading the files. needs_optimizer: False does without the
        file of the optimizer's state, which users delete to save space.

        Raises UserError where the folder is no checkpoint, or a file is missing, cut short or changed.
        """
        self.folder = folder
        self.step, files = read_manifest(folder)
        if folder.name != str(self.step):
            raise UserError(f"{folder}: holds step {self.step}; give the folder its name back")
        optimizer = file_name(self.step, "optimizer")
        if not needs_optimizer:
            files.pop(optimizer, None)
        for name, problem in find_damaged_files(folder, files, checksums):
            more = ", or go on without it (--resume_no_optimze true)" if name == optimizer else ""
            raise UserError(f"{folder / name}: {problem}; the checkpoint is damaged. Take another one{more}")

    @property
    def weight_file(self) -> Path:
        return self.folder / file_name(self.step, "weights")

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.folder / TOKENIZER

    def weights(self) -> dict[str, torch.Tensor]:
        return _read(self.weight_file)

    def optimizer(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, as engines take it. Raises UserError where the checkpoint has the model alone."""
        file = self.folder / file_name(self.step, "optimizer")
        if not file.is_file():
            raise UserError(
                f"{self.folder}: holds no state of the optimizer (it was saved with save_model_only); "
                "--resume_no_optimze true goes on without it"
            )
        return _read(file)

    def ema_weights(self) -> dict[str, torch.Tensor]:
        """The running means of weights; empty where there are none."""
        file = self.folder / file_name(self.step, "ema")
        return _read(file) if file.is_file() else {}

    def run_config(self) -> dict[str, Any]:
        """The configuration it was made with, as RunConfig.to_json gives it; empty where it was not kept."""
        file = self.folder / RUN_CONFIG
        return with_current_keys(read_object(file, is_input=False)) if file.is_file() else {}

    def loader_state(self) -> dict[str, Any]:
        return read_object(self.folder / LOADER_STATE, is_input=False)

    def trainer_state(self) -> dict[str, Any]:
        return read_object(self.folder / file_name(self.step, "trainer_state"), is_input=False)


def _read(file: Path) -> dict[str, torch.Tensor]:
    from fm9g.io.weights import read_weights

    return read_weights(file)


def read_manifest(folder: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Step, and size and checksum of every file. Raises UserError where the manifest is missing or not one."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder}: not a checkpoint ({MANIFEST} is missing)")
    manifest = read_json(file, is_input=False)
    try:
        files = {name: (int(size), str(crc)) for name, (size, crc) in manifest["files"].items()}
        return int(manifest["step"]), files
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: not a manifest; the checkpoint is damaged") from None


def find_damaged_files(
    folder: Path, files: dict[str, tuple[int, str]], checksums: bool, on_progress: ProgressCallback | None = None
) -> Iterator[tuple[str, str]]:
    """Name, and what is wrong, of files that are not as the manifest says. checksums: False compares sizes alone."""
    for name, (size, crc) in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            yield name, "is missing"
        elif found != size:
            yield name, f"has {found} of {size} bytes"
        elif checksums and checksum(file, on_progress) != crc:
            yield name, "its content has changed"


def checksum(file: Path, on_progress: ProgressCallback | None = None) -> str:
    """CRC-32 of its content, as manifests hold it."""
    value = 0
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            value = zlib.crc32(block, value)
            if on_progress:
                on_progress(len(block))
    return f"{value:08x}"


def list_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, in order. Unfinished ones are not among them."""
    if not root.is_dir():
        return []
    return sorted(
        int(folder.name) for folder in root.iterdir() if _is_step(folder.name) and (folder / MANIFEST).is_file()
    )


def last_step(root: Path) -> int | None:
    """The newest step whose files all have their sizes; None where there is none."""
    return next((step for step in reversed(list_steps(root)) if _trainer_state(root / str(step)) is not None), None)


def best_step(root: Path) -> int | None:
    """The step of the checkpoint with the lowest validation loss; None where none was evaluated."""
    losses = {step: (_trainer_state(root / str(step)) or {}).get("val_loss") for step in list_steps(root)}
    known = {step: loss for step, loss in losses.items() if isinstance(loss, (int, float)) and math.isfinite(loss)}
    return min(known, key=lambda step: known[step]) if known else None


def _trainer_state(folder: Path) -> dict[str, Any] | None:
    """What is known of a checkpoint; None where it is damaged, or deleted in this moment."""
    try:
        return Checkpoint(folder, checksums=False, needs_optimizer=False).trainer_state()
    except UserError:
        return None


def resolve_step(root: Path, name: str) -> int:
    """The step of the checkpoint that `best` or `last` names. Raises UserError where there is none."""
    steps = list_steps(root)
    if not steps:
        raise UserError(f"{root}: holds no checkpoint, so none is the {name} one")
    found = best_step(root) if name == BEST else last_step(root)
    if found is not None:
        return found
    listed = f"its steps: {', '.join(map(str, steps))}"
    if name == LAST or last_step(root) is None:
        raise UserError(f"{root}: no checkpoint is whole (`fm9g ckpt ls` says why); {listed}")
    raise UserError(
        f"{root}: no checkpoint holds a validation loss, so none is the best; {listed}. A run has one with "
        "val_dataset, where eval_iters and save_iters meet"
    )


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))


def mark_abandoned(root: Path, steps: list[int]) -> None:
    """Gives checkpoints a name, STEP.left, under which no run goes on from them; older ones of that name go.

    Raises UserError where that cannot be done; when it is tried again, those that have the name keep it.
    """
    for step in steps:
        folder, abandoned = root / str(step), root / f"{step}.left"
        if not folder.exists():
            continue
        try:
            if abandoned.exists():
                atomic_rmtree(abandoned)
            folder.rename(abandoned)
        except OSError as error:
            raise as_user_error(error, abandoned) from error


def latest_checkpoint(
    root: Path, ignored: Mapping[str, Any] | None = None, needs_optimizer: bool = True
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    ignored: what `checkpoint_ids` gave before;
    they do not count, and none has to be whole. needs_optimizer: see Checkpoint. Raises UserError where there
    are checkpoints and none is whole."""
    notes: list[str] = []
    if root.is_dir():
        candidates = [folder for folder in sorted(root.iterdir()) if folder.name.isdecimal() and folder.is_dir()]
        for folder in candidates:
            if not _is_step(folder.name) or not (folder / MANIFEST).is_file():
                notes.append(f"{folder}: passed over: {MANIFEST} is missing, or its name is not that of a step")
    for step in reversed(list_steps(root)):
        if ignored and ignored.get(str(step)) == _checkpoint_id(root / str(step)):
            continue
        try:
            return Checkpoint(root / str(step), needs_optimizer=needs_optimizer), notes
        except UserError as error:
            notes.append(str(error))
    if list_steps(root) and notes and ignored is None:
        raise UserError(*notes, f"{root}: no checkpoint is whole; --overwrite true starts anew")
    return None, []


def checkpoint_ids(root: Path) -> dict[str, Any]:
    """What tells the checkpoints of a run's folder from others that later have their names, as JSON. Not the time: the
    clocks of a machine and of its files may differ, and step."""
    return {str(step): _checkpoint_id(root / str(step)) for step in list_steps(root)}


def _checkpoint_id(folder: Path) -> list[int]:
    status = (folder / MANIFEST).stat()
    return [status.st_ino, status.st_mtime_ns]


def open_checkpoint(root: Path, step: int, needs_optimizer: bool = True) -> Checkpoint:
    """The checkpoint of a step. Raises UserError that lists those that are there."""
    steps = list_steps(root)
    if step not in steps:
        raise UserError(f"{root}: no checkpoint of step {step}; there are: {', '.join(map(str, steps)) or 'none'}")
    return Checkpoint(root / str(step), needs_optimizer=needs_optimizer)
