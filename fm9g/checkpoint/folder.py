"""A checkpoint: a folder `<step>` with weights, optimizer state, data position and what describes them.

It is written under a temporary name, with size and CRC-32 of every file in manifest.json, and renamed when whole.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.weights import read_weights, write_weights
from fm9g.errors import UserError
from fm9g.files import new_folder, recover

MANIFEST, POSITION, MODEL_CONFIG, TOKENIZER = "manifest.json", "data_position.json", "config.json", "tokenizer"
_STEM = "fm9g_live_checkpoint"


@dataclass(frozen=True)
class Tensors:
    """Whole tensors that come one at a time. like: a tensor of the shape and type of each, on the meta device."""

    like: Mapping[str, torch.Tensor]
    values: Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    weights, optimizer: as an engine gives them. position: as the loader gives it. counts: iteration,
    global_token_pass, global_total_task_token. documents: file name -> JSON content. tokenizer_files: file name -> a
    file to copy, or text.
    """

    weights: Tensors
    optimizer: Tensors
    position: dict[str, Any]
    counts: dict[str, Any]
    documents: dict[str, Any]
    tokenizer_files: dict[str, Path | str]


def save_checkpoint(root: Path, step: int, snapshot: Snapshot) -> Path:
    """Writes root/<step>, in place of one that is there. Raises UserError for a full disk, which changes nothing."""
    target = root / str(step)
    with new_folder(target, overwrite=True) as folder:
        for suffix, tensors in ((".pt", snapshot.weights), (".rank-0.opt", snapshot.optimizer)):
            write_weights(folder / f"{_STEM}-{step}{suffix}", tensors.like, tensors.values)
        documents = {f"{_STEM}-{step}.log_ckpt": snapshot.counts, POSITION: snapshot.position, **snapshot.documents}
        for name, content in documents.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        (folder / TOKENIZER).mkdir()
        for name, content in snapshot.tokenizer_files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / TOKENIZER / name)
            else:
                (folder / TOKENIZER / name).write_text(content, encoding="utf-8")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sums = {str(file.relative_to(folder)): [file.stat().st_size, _checksum(file)] for file in files}
        manifest = {"step": step, "files": sums}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return target


class Checkpoint:
    """An existing checkpoint; opening it compares every file's size and checksum with the manifest."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder is no checkpoint, or a file is missing or cut short."""
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: not a checkpoint ({MANIFEST} is missing)")
        manifest = self._read(MANIFEST)
        try:
            self.step = int(manifest["step"])
            files = {name: (int(size), str(checksum)) for name, (size, checksum) in manifest["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{folder / MANIFEST}: not a manifest; the checkpoint is damaged") from None
        if folder.name != str(self.step):
            raise UserError(f"{folder}: holds step {self.step}; give the folder its name back")
        for name, (size, checksum) in files.items():
            file = folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} of {size} bytes"
                raise UserError(f"{file}: {state}; the checkpoint is damaged. Take another one")
            if _checksum(file) != checksum:
                raise UserError(f"{file}: its content has changed; the checkpoint is damaged. Take another one")

    @property
    def weight_file(self) -> Path:
        return self.folder / f"{_STEM}-{self.step}.pt"

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.folder / TOKENIZER

    def weights(self) -> dict[str, torch.Tensor]:
        return read_weights(self.weight_file)

    def optimizer(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, as engines take it."""
        return read_weights(self.folder / f"{_STEM}-{self.step}.rank-0.opt")

    def position(self) -> dict[str, Any]:
        return self._read(POSITION)

    def counts(self) -> dict[str, Any]:
        return self._read(f"{_STEM}-{self.step}.log_ckpt")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name}: cannot be read: {error}") from None


def _checksum(file: Path) -> str:
    value = 0
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def steps_in(root: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, in order. Unfinished ones are not among them."""
    if not root.is_dir():
        return []
    return sorted(
        int(folder.name) for folder in root.iterdir() if folder.name.isdecimal() and (folder / MANIFEST).is_file()
    )


def open_step(root: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises UserError that lists those that are there."""
    recover(root / str(step))
    steps = steps_in(root)
    if step not in steps:
        raise UserError(f"{root}: no checkpoint of step {step}; there are: {', '.join(map(str, steps)) or 'none'}")
    return Checkpoint(root / str(step))
