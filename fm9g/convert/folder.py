"""What a Hugging Face folder holds, without its values: the model configuration and the places of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fm9g.checkpoint.stored import Gathered, Stored, open_pt, open_safetensors
from fm9g.checkpoint.weights import Described, check_dtypes, check_weights
from fm9g.config.load import read_object
from fm9g.config.model import ModelConfig
from fm9g.convert.architecture import from_hf_config
from fm9g.convert.families import family_of, normalized, unpack
from fm9g.convert.names import LLAMA, Names, bare
from fm9g.errors import UserError
from fm9g.model.transformer import weight_shapes
from fm9g.regular_file import check_regular

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "input_embedding.weight"
_PIECE = 1 << 25  # bytes that are compared at a time
# The files of weights: the one, the list of several, any that look like it; and their reader.
_KINDS: tuple[tuple[str, str, Callable[[Path], dict[str, Stored]]], ...] = (
    ("model", ".safetensors", open_safetensors),
    ("pytorch_model", ".bin", open_pt),
)


def open_folder(source: Path) -> tuple[ModelConfig, dict[str, Gathered]]:
    """The 9G configuration of a Hugging Face folder, and its weights under their 9G names, to be read one at a time.

    Raises UserError where a weight has no 9G name, is missing, or does not fit the configuration.
    """
    hf = read_object(source / "config.json")
    config = from_hf_config(hf, str(source / "config.json"))
    family = family_of(hf, str(source / "config.json"))
    stored = stored_in(source)
    check_dtypes(stored, str(source))
    weights = unpack(family, config, stored, str(source))
    if family.normed_head(hf) and HEAD in weights:
        weights[HEAD] = dataclasses.replace(weights[HEAD], change=normalized)
    if config.tie_word_embeddings and HEAD in weights:  # as transformers 5 does
        if EMBEDDING not in weights:
            weights[EMBEDDING] = weights.pop(HEAD)
        elif _equal(weights[HEAD], weights[EMBEDDING]):
            del weights[HEAD]
        else:
            config = dataclasses.replace(config, tie_word_embeddings=False)
    check_weights(weights, weight_shapes(config), str(source), strict=True)
    if not (hf.get("dtype") or hf.get("torch_dtype")):  # then the weights say it
        names = {dtype: name for name, dtype in DTYPES.items()}
        config = dataclasses.replace(config, half_type=names.get(main_dtype(weights), "fp32"))
    return config, weights


def open_weights(file: Path) -> dict[str, Stored]:
    """The weights of a 9G .pt file, under their names without what wrappers put in front. Raises UserError."""
    names = Names(LLAMA)
    weights: dict[str, Stored] = {}
    for stored_as, tensor in open_pt(file).items():
        name = bare(stored_as, lambda name: names.theirs(name) is not None)
        if name in weights:
            raise UserError(f"{file}: {stored_as}: is there twice, as {name}; remove the one that is wrong")
        weights[name] = tensor
    return weights


def main_dtype(weights: Mapping[str, Described]) -> torch.dtype:
    """That of most of the weights' bytes."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.shape.numel() * weight.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype])


def stored_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors or, where there are none, .bin files, in their order.

    As transformers looks for them: one file, else those that an index lists. Raises UserError where one is missing, or
    two files hold a tensor of one name.
    """
    for stem, suffix, reader in _KINDS:
        index = folder / f"{stem}{suffix}.index.json"
        if (folder / f"{stem}{suffix}").is_file():
            return reader(folder / f"{stem}{suffix}")
        if index.is_file():
            return _listed(index, reader)
        if shards := sorted(folder.glob(f"{stem}*{suffix}")):
            return _joined(shards, reader)
    raise UserError(f"{folder}: neither model*.safetensors nor pytorch_model*.bin is there")


def check_files(folder: Path) -> None:
    """Raises UserError for a file of weights that is not whole, or that holds code. Reads no values."""
    for stem, suffix, reader in _KINDS:
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        for file in files:
            reader(file)
        if files:
            return


def _listed(index: Path, reader: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: weight_map: expected an object from weight names to file names; get it again")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index}: {file}: expected the name of a file beside it")
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file}: is missing, and {index.name} lists it; get it again")
    tensors = _joined([index.parent / file for file in files], reader)
    for name, file in places.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{index.parent / file}: {name}: is missing, and {index.name} lists it; get both again")
    return tensors


def _joined(files: list[Path], reader: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        check_regular(file)
        for name, tensor in reader(file).items():
            if name in tensors:
                raise UserError(f"{file}: {name}: is in {tensors[name].file.name} too; remove the one that is wrong")
            tensors[name] = tensor
    return tensors


def _equal(one: Gathered, other: Gathered) -> bool:
    """Whether two tensors have the same values, which are read in pieces."""
    if one.shape != other.shape or one.parts == other.parts:
        return one.shape == other.shape
    return all(torch.equal(a.read(), b.read()) for a, b in zip(one.groups(_PIECE), other.groups(_PIECE)))
