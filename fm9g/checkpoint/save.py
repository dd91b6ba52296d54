"""Writing a checkpoint. Its folder appears under its name only when complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.layout import LOADER_STATE, TOKENIZER, file_name
from fm9g.checkpoint.manifest import write_manifest
from fm9g.io.atomic import atomic_dir
from fm9g.io.pt_file import Tensors, write_weights


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint.

    Attributes:
        step: finished steps.
        weights, optimizer, ema: from an engine; optimizer and ema may be None.
        loader_state: from the loader.
        trainer_state: iteration, global_token_pass, global_total_task_token, and other state of the run.
        json_files: file name -> JSON content.
        tokenizer_files: file name -> a file to copy, or text.
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
        """weights, optimizer and ema, as far as they exist."""
        tensors = {"weights": self.weights, "optimizer": self.optimizer, "ema": self.ema}
        return {kind: each for kind, each in tensors.items() if each is not None}


def save_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Writes root/<step> and replaces an existing one. Raises UserError for a full disk, which changes nothing."""
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
        _write_tokenizer(folder / TOKENIZER, snapshot.tokenizer_files)
        write_manifest(folder, step)
    return target


def _write_tokenizer(folder: Path, files: Mapping[str, Path | str]) -> None:
    folder.mkdir()
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)  # additional_chat_templates/
        if isinstance(content, Path):
            shutil.copyfile(content, file)
        else:
            file.write_text(content, encoding="utf-8")
