"""Reading a checkpoint: a folder with weights, optimizer state, loader state and the configuration of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.checkpoint.layout import LOADER_STATE, RUN_CONFIG, TOKENIZER, file_name
from fm9g.checkpoint.manifest import find_damaged_files, read_manifest
from fm9g.config.run import with_current_keys
from fm9g.errors import UserError
from fm9g.io.json_file import read_object

if TYPE_CHECKING:  # listing checkpoints works without torch
    import torch


class Checkpoint:
    """An existing checkpoint. Opening it compares size and checksum of every file with the manifest.

    Tensors come as state dicts that read each tensor when it is looked up.
    """

    def __init__(self, folder: Path, checksums: bool = True, needs_optimizer: bool = True) -> None:
        """Opens a checkpoint.

        Args:
            folder: its folder, named by its step.
            checksums: False compares only the sizes and reads no file.
            needs_optimizer: False ignores the optimizer file, which users delete to save space.

        Raises UserError if the folder is not a checkpoint, or a file is missing, truncated or changed.
        """
        self.folder = folder
        self.step, files = read_manifest(folder)
        if folder.name != str(self.step):
            raise UserError(f"{folder}: is the checkpoint of step {self.step}; rename the folder to {self.step}")
        optimizer = file_name(self.step, "optimizer")
        if not needs_optimizer:
            files.pop(optimizer, None)
        for name, problem in find_damaged_files(folder, files, checksums):
            hint = ", or continue without it (--resume_no_optimze true)" if name == optimizer else ""
            raise UserError(f"{folder / name}: {problem}; the checkpoint is damaged. Use another one{hint}")

    @property
    def weight_file(self) -> Path:
        return self.folder / file_name(self.step, "weights")

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.folder / TOKENIZER

    def weights(self) -> Mapping[str, torch.Tensor]:
        return _read(self.weight_file)

    def optimizer(self) -> Mapping[str, torch.Tensor]:
        """The optimizer state for an engine. Raises UserError if the checkpoint has none."""
        file = self.folder / file_name(self.step, "optimizer")
        if not file.is_file():
            raise UserError(
                f"{self.folder}: has no optimizer state (it was saved with save_model_only); "
                "--resume_no_optimze true continues without it"
            )
        return _read(file)

    def ema_weights(self) -> Mapping[str, torch.Tensor]:
        """The exponential moving average of the weights; empty if the checkpoint has none."""
        file = self.folder / file_name(self.step, "ema")
        return _read(file) if file.is_file() else {}

    def run_config(self) -> dict[str, Any]:
        """The configuration of the run, in the form of RunConfig.to_json; empty if it was not saved."""
        file = self.folder / RUN_CONFIG
        return with_current_keys(read_object(file, is_input=False)) if file.is_file() else {}

    def loader_state(self) -> dict[str, Any]:
        return read_object(self.folder / LOADER_STATE, is_input=False)

    def trainer_state(self) -> dict[str, Any]:
        return read_object(self.folder / file_name(self.step, "trainer_state"), is_input=False)


def _read(file: Path) -> Mapping[str, torch.Tensor]:
    from fm9g.io.pt_file import read_weights

    return read_weights(file)
