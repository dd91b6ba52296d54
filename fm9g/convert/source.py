"""A model on disk, opened once: its configuration, its weights as lazy tensors under their 9G names, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST, MODEL_CONFIG
from fm9g.checkpoint.weight_check import check_weights
from fm9g.config.adapter import AdapterConfig
from fm9g.config.model import ModelConfig, architecture_of, load_model_config, values_differ
from fm9g.convert.hf_config import from_hf_config
from fm9g.convert.hf_reader import open_hf_folder
from fm9g.convert.weight_map import LLAMA_MAP, WeightMap, strip_wrappers
from fm9g.errors import UserError
from fm9g.io.json_file import read_object
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor
from fm9g.io.pt_file import open_pt
from fm9g.model.transformer import weight_shapes
from fm9g.path_kind import MODEL, TOKENIZER, check_kind

WeightsCheck = Callable[[Mapping[str, LazyConcat]], None]


@dataclass(frozen=True)
class Source:
    """An opened model, which holds no values yet. Whoever writes or describes it asks this object, not the disk.

    Args:
        config: of the model.
        weights: 9G name -> lazy tensor.
        checkpoint: the 9G checkpoint that holds the weights; None for a bare .pt file and a Hugging Face folder.
        tokenizer: folder of the tokenizer's files; None: unknown.
        reference: Hugging Face folder whose configuration, tokenizer and generation settings an export takes over.
        reference_config: content of the reference's config.json; empty without a reference.
        adapter: merged into the weights; None: no merge.
        base: of a merge.
    """

    config: ModelConfig
    weights: Mapping[str, LazyConcat]
    checkpoint: Checkpoint | None = None
    tokenizer: Path | None = None
    reference: Path | None = None
    reference_config: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterConfig | None = None
    base: Path | None = None


def open_source(path: Path, reference: Path | None = None) -> Source:
    """Opens a Hugging Face folder, a 9G checkpoint or a 9G .pt file. A Hugging Face folder is its own reference.

    Raises:
        UserError: the configuration is unknown, or the weights do not fit it.
    """
    if not path.is_dir() or (path / MANIFEST).is_file():
        return open_9g_source(path, reference)
    reference = reference or path
    config, weights = open_hf_folder(path)
    return Source(
        config, weights, tokenizer=path, reference=reference, reference_config=read_object(reference / "config.json")
    )


def open_9g_source(path: Path, reference: Path | None = None) -> Source:
    """Opens a 9G checkpoint folder or .pt file.

    Args:
        reference: takes the place of the model's own configuration and tokenizer.

    Raises:
        UserError: the configuration is unknown, contradicts the reference, or the weights do not fit it.
    """
    hf_config = _open_reference(reference) if reference else {}
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        raise UserError(
            f"{path}: is a Hugging Face folder already; to convert it to a 9G file, give a target whose name ends "
            "in .pt"
        )
    checkpoint = _open_checkpoint(path)
    file = checkpoint.weight_file if checkpoint and path.is_dir() else path
    config_file = checkpoint.folder / MODEL_CONFIG if checkpoint else file.with_suffix(".json")
    if reference is None:
        if not config_file.is_file():
            raise UserError(f"{file}: has no model configuration; give the folder that it came from with --reference")
        config = load_model_config(config_file)
    else:
        config = from_hf_config(hf_config, str(reference / "config.json"))
        if checkpoint:  # a .pt file may have any .json beside it
            _check_same_architecture(load_model_config(config_file), config, config_file, reference)
    tokenizer = reference or (checkpoint.tokenizer if checkpoint else None)
    return Source(config, open_9g_weights(file, config), checkpoint, tokenizer, reference, hf_config)


def open_9g_weights(file: Path, config: ModelConfig) -> dict[str, LazyConcat]:
    """The weights of a 9G .pt file, to be read one at a time. Raises UserError if they do not fit the configuration."""
    weights = open_pt_weights(file)
    check_weights(weights, weight_shapes(config), str(file), strict=True)
    return {name: LazyConcat((tensor,), tensor.dtype) for name, tensor in weights.items()}


def open_pt_weights(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a 9G .pt file, by name without the prefixes of wrappers such as DistributedDataParallel.

    Raises UserError if a name occurs twice.
    """
    names = WeightMap(LLAMA_MAP)
    weights: dict[str, LazyTensor] = {}
    for raw_name, tensor in open_pt(file).items():
        name = strip_wrappers(raw_name, lambda name: names.to_hf(name) is not None)
        if name in weights:
            raise UserError(f"{file}: {raw_name}: is there twice, as {name}; remove the one that is wrong")
        weights[name] = tensor
    return weights


def _open_reference(reference: Path) -> dict[str, Any]:
    if not reference.is_dir():
        raise UserError(f"{reference}: no such folder; expected the Hugging Face folder that the model came from")
    check_kind(reference, MODEL, TOKENIZER)
    return read_object(reference / "config.json")


def _open_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at a path, or around a file such as its .ema.pt."""
    if path.is_dir():
        return Checkpoint(path, needs_optimizer=False)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return Checkpoint(path.parent, needs_optimizer=False) if (path.parent / MANIFEST).is_file() else None


def _check_same_architecture(own: ModelConfig, config: ModelConfig, config_file: Path, reference: Path) -> None:
    """own: from config_file; config: from the reference."""
    own_values, reference_values = architecture_of(own), architecture_of(config)
    mismatched = [key for key in own_values if values_differ(own_values[key], reference_values[key])]
    if mismatched:
        values = "; ".join(f"{key} is {own_values[key]!r} there, {reference_values[key]!r} here" for key in mismatched)
        raise UserError(
            f"{reference / 'config.json'}: describes another model than {config_file}: {values}; leave out "
            "--reference, or give the folder that the model came from"
        )
