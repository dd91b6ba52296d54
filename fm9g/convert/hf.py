"""Hugging Face folders in and out, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fm9g.checkpoint.folder import MANIFEST, MODEL_CONFIG, TOKENIZER, Checkpoint
from fm9g.checkpoint.weights import check_weights, read_weights, write_weights
from fm9g.config.load import read_object
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.convert.architecture import from_hf_config, to_hf_config
from fm9g.convert.names import to_9g, to_hf
from fm9g.data.tokenizer import CHAT_TEMPLATE, SentencePieceTokenizer, load_tokenizer
from fm9g.errors import UserError
from fm9g.files import new_file, new_folder
from fm9g.model.transformer import weight_shapes
from fm9g.progress import Progress

SHARD_BYTES = 5 * 1000**3
# What travels from a reference folder beside config.json, which is written anew.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_folder(source: Path, target: Path, overwrite: bool = False) -> Path:
    """Writes the weights of a Hugging Face folder as a 9G .pt file, unchanged, and its model configuration beside it.

    Returns the path of the configuration, <target>.json. Raises UserError where a weight has no 9G name or is missing.
    """
    if (source / MANIFEST).is_file():
        raise UserError(f"{source}: a 9G checkpoint; its .pt file is {Checkpoint(source).weight_file}")
    config_file = target.with_suffix(".json")
    if config_file.resolve() == (source / "config.json").resolve():
        raise UserError(f"{target}: its configuration would replace {config_file}, which is read; choose another name")
    for file in (target, config_file):
        if file.is_dir() or (file.exists() and not overwrite):
            raise UserError(f"{file}: is there already; choose another name or allow it to be replaced (--overwrite)")
    config, weights = read_folder(source)
    check_weights(weights, weight_shapes(config), str(source), strict=True)
    write_weights(target, weights, weights.items())
    with new_file(config_file) as temporary:
        temporary.write_text(json.dumps(config.to_json(), indent=4), encoding="utf-8")
    return config_file


def read_folder(source: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The 9G configuration and weights of a Hugging Face folder. Raises UserError where a weight has no 9G name."""
    config = from_hf_config(read_object(source / "config.json"), str(source / "config.json"))
    weights: dict[str, torch.Tensor] = {}
    unknown = []
    head = None
    for name, tensor in _read_folder(source):
        ours = to_9g(name)
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            head = tensor
        elif ours is not None:
            weights[ours] = tensor
        elif not name.endswith("rotary_emb.inv_freq"):  # a constant that old folders hold
            unknown.append(name)
    if unknown:
        raise UserError(f"{source}: {unknown[0]} and {len(unknown) - 1} more have no place in a 9G model")
    if head is not None and not torch.equal(head, weights.get("input_embedding.weight", head)):
        raise UserError(f"{source}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    return config, weights


def export_folder(
    source: Path, target: Path, reference: Path | None = None, dtype: str = "", overwrite: bool = False
) -> str:
    """Writes a 9G checkpoint folder or .pt file as a folder that transformers loads without remote code.

    reference: a Hugging Face folder whose configuration, tokenizer and generation settings travel along; without one
    they come from the checkpoint, or the configuration from <source>.json.
    dtype: bf16, fp16 or fp32; empty: the weights stay as they are.
    Returns the name of the transformers class. Raises UserError.
    """
    file, config, tokenizer = _open_source(source, reference)
    weights = read_weights(file)
    check_weights(weights, weight_shapes(config), str(file), strict=True)
    wanted = _DTYPES.get(dtype) or next(iter(weights.values())).dtype
    sources = (source, reference) if reference else (source,)
    with new_folder(target, overwrite, sources) as folder:
        _write_shards(weights, folder, wanted)
        ids = _write_tokenizer(tokenizer, folder)
        trained_with = (source if source.is_dir() else source.parent) / TOKENIZER / CHAT_TEMPLATE
        if trained_with.is_file():  # whatever the reference says
            shutil.copyfile(trained_with, folder / CHAT_TEMPLATE)
        hf = to_hf_config(config, str(wanted).removeprefix("torch."), **ids)
        generation: dict[str, Any] = {"bos_token_id": ids["bos_id"], "eos_token_id": ids["eos_id"]}
        if reference is not None:
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                hf[key] = read_object(reference / "config.json").get(key, hf[key])
            if (reference / "generation_config.json").is_file():
                generation = read_object(reference / "generation_config.json")
        for name, content in (("config.json", hf), ("generation_config.json", generation)):
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return hf["architectures"][0]


def _open_source(source: Path, reference: Path | None) -> tuple[Path, ModelConfig, Path | None]:
    """The .pt file, the model configuration and the tokenizer's folder of what is to be exported."""
    folder = Checkpoint(source) if source.is_dir() else None
    file = folder.weight_file if folder else source
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if reference is not None:
        config = from_hf_config(read_object(reference / "config.json"), str(reference / "config.json"))
        return file, config, reference
    if not folder and (file.parent / MANIFEST).is_file():  # another file of a checkpoint, such as its .ema.pt
        folder = Checkpoint(file.parent)
    beside = folder.folder / MODEL_CONFIG if folder else file.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"{file}: its model configuration is not known; give the folder it came from with --reference")
    return file, load_model_config(beside).value, folder.tokenizer if folder else None


def _read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a folder of safetensors or, where there are none, of .bin files."""
    shards = sorted(folder.glob("model*.safetensors"))
    bins = [] if shards else sorted(folder.glob("pytorch_model*.bin"))
    if not shards and not bins:
        raise UserError(f"{folder}: neither model*.safetensors nor pytorch_model*.bin is there")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, file.get_tensor(name)
        except Exception as error:  # safetensors raises its own error class
            raise UserError(f"{shard}: not a whole safetensors file: {error}") from None
    for file in bins:
        yield from read_weights(file).items()


def _write_shards(weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        nbytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    mode = folder.stat().st_mode & 0o666  # a folder's mode follows the umask
    total = 0
    where: dict[str, str] = {}
    with Progress("writing weights", total=len(weights), unit="tensors") as progress:
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {str(to_hf(name)): weights[name].to(dtype).contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)  # safetensors lets nobody else read its files
            where |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
            progress.advance(len(names))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_tokenizer(source: Path | None, folder: Path) -> dict[str, int | None]:
    """Copies a tokenizer's files; a bare SentencePiece model gets the configuration transformers needs."""
    for name in _TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if source is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return {"bos_id": None, "eos_id": None}
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, SentencePieceTokenizer) and not (folder / "tokenizer_config.json").is_file():
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": tokenizer.adds_prefix_space,
            "legacy": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
