"""Adapters beside each other on one model in memory, unmerged; one is active at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.convert.adapters import read_adapter
from fm9g.convert.aux_files import write_tokenizer
from fm9g.convert.peft import is_peft, write_peft
from fm9g.data.encode.tokenizer_files import tokenizer_files
from fm9g.errors import UserError, error_text
from fm9g.io.json_file import read_object
from fm9g.io.safetensors_file import open_safetensors


class AdapterSet:
    """The adapters of a model.

    Args:
        model: of transformers; its layers are wrapped.
        folders: name -> folder in PEFT's layout.
    """

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        from fm9g.import_utils import without_bitsandbytes

        with without_bitsandbytes():
            from peft import PeftModel

        self.names, self.active = tuple(folders), next(iter(folders))
        self._peft: Any = None
        _add_token_rows(model, folders)
        for name, folder in folders.items():
            try:
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
                else:
                    self._peft.load_adapter(str(folder), adapter_name=name)
            except Exception as error:  # PEFT and torch raise many kinds
                raise UserError(f"adapter {name}: PEFT cannot load it on this model: {error_text(error)}") from None
        self._peft.eval().requires_grad_(False)
        self.use(self.names[0])

    def use(self, name: str) -> None:
        """Makes one the active adapter; empty: the model without any."""
        if name:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name)
            self._peft.requires_grad_(False)
        else:
            self._peft.base_model.disable_adapter_layers()
        self.active = name


def _add_token_rows(model: Any, folders: Mapping[str, Path]) -> None:
    """Gives the model's embedding as many rows as the adapters have, some of which were trained with more tokens."""
    sizes = {
        name: tensor.shape[0]
        for name, folder in folders.items()
        for key, tensor in open_safetensors(folder / "adapter_model.safetensors").items()
        if key.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"adapters: they were trained with different numbers of tokens ({found}); open them one by one")
    for size in set(sizes.values()) - {model.get_input_embeddings().num_embeddings}:
        model.resize_token_embeddings(size, mean_resizing=False)  # PEFT replaces the rows


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter: a checkpoint, a folder or a .pt file of ours, or a PEFT folder."""
    folder = path if path.is_dir() else path.parent
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    # A Hugging Face folder may hold an adapter beside the weights of the model.
    is_model = (folder / "config.json").is_file() and not (folder / MANIFEST).is_file()
    return path.is_file() or not is_model


def base_of(path: Path) -> str:
    """The model that an adapter says it belongs to: a path or a name; empty: it does not say."""
    folder = path if path.is_dir() else path.parent
    return str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def as_peft(path: Path, temporary: Path) -> Path:
    """The adapter as a folder in PEFT's layout: itself, or written to a new folder inside a temporary one."""
    if path.is_dir() and is_peft(path):
        return path
    target = Path(tempfile.mkdtemp(dir=temporary)) / "peft"
    write_peft(read_adapter(path), target)
    return target


def own_tokenizer(path: Path, model_folder: Path, temporary: Path) -> Path | None:
    """A folder with the tokenizer and chat template that an adapter was trained with; None: those of its base.

    Args:
        model_folder: of the base, whose config.json says which tokenizer class transformers takes.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        return folder if tokenizer_files(folder) else None
    checkpoint = Checkpoint(folder, needs_optimizer=False)
    if checkpoint.tokenizer is None:
        return None
    target = Path(tempfile.mkdtemp(dir=temporary))
    (target / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    return target if write_tokenizer(checkpoint.tokenizer, folder, target).opener else None
