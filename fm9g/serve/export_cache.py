"""Hugging Face and PEFT folders for vLLM, of models that have another layout: exported once, and kept."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from fm9g.convert.adapters import read_adapter
from fm9g.convert.hf_export import write_hf_folder
from fm9g.convert.peft import is_peft, write_peft
from fm9g.infer.open_model import is_hf_folder, open_with_tokenizer
from fm9g.io.lock import wait_lock
from fm9g.shorthand.data_cache import default_cache_folder

logger = logging.getLogger(__name__)


def hf_folder_of(path: Path) -> Path:
    """The model as a Hugging Face folder: itself, or an export of it in the cache."""
    if is_hf_folder(path):
        return path
    return _cached(path, lambda target: write_hf_folder(open_with_tokenizer(path), target))


def peft_folder_of(path: Path) -> Path:
    """The adapter as a PEFT folder: itself, or an export of it in the cache."""
    if path.is_dir() and is_peft(path):
        return path
    return _cached(path, lambda target: write_peft(read_adapter(path), target))


def _cached(path: Path, write: Callable[[Path], object]) -> Path:
    folder = default_cache_folder().parent / "exports"
    target = folder / f"{path.resolve().name}-{_state_of(path)}"
    with wait_lock(folder / f"{target.name}.lock", f"{target}: another process writes it; waiting"):
        if not target.exists():
            logger.info(f"{path}: exporting it to {target} for vLLM (once)")
            write(target)
    return target


def _state_of(path: Path) -> str:
    """A hash of where a model is, and of size and time of its files."""
    files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
    states = [(os.path.realpath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]
