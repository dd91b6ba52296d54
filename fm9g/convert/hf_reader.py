"""Opens a Hugging Face folder without reading values: its 9G model configuration and its weights as lazy tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fm9g.checkpoint.weight_check import check_dtypes, check_weights
from fm9g.config.model import ModelConfig
from fm9g.convert.families import family_of, from_hf_weights, normalized
from fm9g.convert.hf_config import from_hf_config
from fm9g.errors import UserError
from fm9g.io.json_file import read_object
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor, TensorMeta
from fm9g.io.pt_file import open_pt
from fm9g.io.regular_file import check_regular
from fm9g.io.safetensors_file import open_safetensors
from fm9g.model.transformer import weight_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LM_HEAD, EMBEDDING = "lm_head.weight", "input_embedding.weight"
_CHUNK_BYTES = 1 << 25  # compared at a time
# Basename and suffix of the files of weights, and their reader, in the order in which transformers looks for them.
_FORMATS: tuple[tuple[str, str, Callable[[Path], dict[str, LazyTensor]]], ...] = (
    ("model", ".safetensors", open_safetensors),
    ("pytorch_model", ".bin", open_pt),
)


def open_hf_folder(folder: Path) -> tuple[ModelConfig, dict[str, LazyConcat]]:
    """The 9G configuration of a Hugging Face folder, and its weights as lazy tensors under their 9G names.

    Raises UserError if a weight has no 9G name, is missing, or does not fit the configuration.
    """
    hf = read_object(folder / "config.json")
    config = from_hf_config(hf, str(folder / "config.json"))
    family = family_of(hf, str(folder / "config.json"))
    tensors = open_hf_tensors(folder)
    check_dtypes(tensors, str(folder))
    weights = from_hf_weights(family, config, tensors, str(folder))
    if family.has_normalized_head(hf) and LM_HEAD in weights:
        weights[LM_HEAD] = dataclasses.replace(weights[LM_HEAD], transform=normalized)
    if config.tie_word_embeddings and LM_HEAD in weights:  # as transformers 5 does
        if EMBEDDING not in weights:
            weights[EMBEDDING] = weights.pop(LM_HEAD)
        elif _equal(weights[LM_HEAD], weights[EMBEDDING]):
            del weights[LM_HEAD]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
    check_weights(weights, weight_shapes(config), str(folder), strict=True)
    if not (hf.get("dtype") or hf.get("torch_dtype")):
        names = {dtype: name for name, dtype in DTYPES.items()}
        config = dataclasses.replace(config, half_type=names.get(main_dtype(weights), "fp32"))
    return config, weights


def main_dtype(weights: Mapping[str, TensorMeta]) -> torch.dtype:
    """The type of most of the weights' bytes."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.shape.numel() * weight.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype])


def cast_weights(weights: Mapping[str, LazyConcat], dtype: str) -> dict[str, LazyConcat]:
    """The weights, to be read in another type. dtype: a key of DTYPES; empty: unchanged."""
    target = DTYPES.get(dtype)
    return {name: dataclasses.replace(weight, dtype=target or weight.dtype) for name, weight in weights.items()}


def open_hf_tensors(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder's safetensors or, without these, .bin files, under the names and in the order there.

    Finds files as transformers does: one file, else those that an index lists. Raises UserError if a file or a tensor
    is missing, or two files hold a tensor of the same name.
    """
    for stem, suffix, reader in _FORMATS:
        index = folder / f"{stem}{suffix}.index.json"
        if (folder / f"{stem}{suffix}").is_file():
            return reader(folder / f"{stem}{suffix}")
        if index.is_file():
            return _from_index(index, reader)
        if shards := sorted(folder.glob(f"{stem}*{suffix}")):
            return _merge_files(shards, reader)
    raise UserError(f"{folder}: has no weights; expected model*.safetensors or pytorch_model*.bin")


def check_weight_files(folder: Path) -> None:
    """Raises UserError for a file of weights that is incomplete or contains code. Reads no values."""
    for stem, suffix, reader in _FORMATS:
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        for file in files:
            reader(file)
        if files:
            return


def _from_index(index: Path, reader: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map: expected an object from weight names to file names; get it again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index}: {file}: expected the name of a file beside it")
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file}: is missing, but {index.name} lists it; get it again")
    tensors = _merge_files([index.parent / file for file in files], reader)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index.parent / file}: {name}: is missing, but {index.name} lists it; get both again")
    return tensors


def _merge_files(files: list[Path], reader: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        check_regular(file)
        for name, tensor in reader(file).items():
            if name in tensors:
                raise UserError(f"{file}: {name}: is in {tensors[name].file.name} too; remove the one that is wrong")
            tensors[name] = tensor
    return tensors


def _equal(one: LazyConcat, other: LazyConcat) -> bool:
    """Whether two tensors have the same values. Reads them in chunks."""
    if one.shape != other.shape or one.parts == other.parts:
        return one.shape == other.shape
    return all(
        torch.equal(a.read(), b.read()) for a, b in zip(one.row_chunks(_CHUNK_BYTES), other.row_chunks(_CHUNK_BYTES))
    )
