"""9G model -> Hugging Face folder, a few megabytes at a time, whatever the size of the model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.convert.aux_files import WrittenTokenizer, copy_aux_files, stop_ids, write_tokenizer
from fm9g.convert.families import FAMILIES, family_of, to_hf_weights
from fm9g.convert.hf_config import to_hf_config
from fm9g.convert.hf_reader import cast_weights, main_dtype, open_hf_folder
from fm9g.convert.model_card import ModelUse, model_card
from fm9g.convert.native_tokenizer import AUTO_TOKENIZER, write_json
from fm9g.convert.resumable_writer import OutputFile, pt_output, resumable_dir, safetensors_output, write_resumable
from fm9g.convert.source import Source, WeightsCheck, open_9g_source
from fm9g.data.encode.tokenizer import as_id_list
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs
from fm9g.io.json_file import read_object
from fm9g.io.lazy_tensor import LazyConcat

FORMATS = ("safetensors", "bin")
_BASENAMES = {"safetensors": "model", "bin": "pytorch_model"}


@dataclass(frozen=True)
class ExportOptions:
    """How a Hugging Face folder is written.

    Args:
        dtype: bf16, fp16 or fp32; empty: the weights' own.
        overwrite: replace a folder that holds something.
        keep_reference: write the reference's own configuration, code, names and packing of weights, instead of those of
            a transformers class, which needs no code.
        format: of the weights, one of FORMATS.
        shard_bytes: max size of a file of weights that holds more than one weight.
    """

    dtype: str = ""
    overwrite: bool = False
    keep_reference: bool = False
    format: str = "safetensors"
    shard_bytes: int = 5 * 1000**3


@protect_inputs()
def export_folder(
    source: Path, target: Path, reference: Path | None = None, options: ExportOptions = ExportOptions()
) -> str:
    """Writes a 9G checkpoint folder or .pt file as a folder that transformers loads.

    The same call resumes an interrupted export.

    Args:
        reference: Hugging Face folder that gives configuration, tokenizer and generation settings. Without it they
            come from the checkpoint, or the configuration from <source>.json.

    Returns:
        The transformers class that loads the folder, or the model_type of the reference whose code does.

    Raises:
        UserError: the configuration is unknown, no transformers class has the arithmetic, or the weights do not fit.
    """
    if options.keep_reference and reference is None:
        raise UserError("--keep-reference-config needs --reference, the folder whose configuration is kept")
    return write_hf_folder(open_9g_source(source, reference), target, options)


def write_hf_folder(
    source: Source, target: Path, options: ExportOptions = ExportOptions(), check: WeightsCheck | None = None
) -> str:
    """Writes an opened model as `export_folder` does.

    Args:
        check: gets the written weights before they replace the target; what it raises leaves the target as it was.
    """
    target = Path(os.path.realpath(target))
    with atomic_dir(target, options.overwrite) as temporary, resumable_dir(target) as folder:
        weights = _hf_weights(source, options)
        dtype = str(main_dtype(weights)).removeprefix("torch.")
        write_aux = _write_reference_files if options.keep_reference else write_native_files
        use = write_aux(source, temporary, dtype)
        (temporary / "README.md").write_text(model_card(source, temporary, target.name, use), encoding="utf-8")
        shards = _split_shards(weights, options)
        _write_index(shards, options.format, temporary)
        outputs = [_output(file, shard, folder) for file, shard in shards.items()]
        write_resumable(folder, outputs, "writing weights")
        for output in outputs:
            (folder / output.name).rename(temporary / output.name)
        if check:
            check(open_hf_folder(temporary)[1])
        shutil.rmtree(folder)
    return use.loads_as


def _hf_weights(source: Source, options: ExportOptions) -> dict[str, LazyConcat]:
    """The weights under their names in the folder, in their type there."""
    family = FAMILIES["llama"]
    if options.keep_reference:
        family = family_of(source.reference_config, f"{source.reference}/config.json")
    return cast_weights(to_hf_weights(family, source.config, source.weights), options.dtype)


def _split_shards(weights: Mapping[str, LazyConcat], options: ExportOptions) -> dict[str, dict[str, LazyConcat]]:
    """File name -> the weights in it."""
    shards: list[dict[str, LazyConcat]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > options.shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    stem, suffix = _BASENAMES[options.format], options.format
    if len(shards) == 1:
        return {f"{stem}.{suffix}": shards[0]}
    return {f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}": shard for number, shard in enumerate(shards, 1)}


def _write_index(shards: Mapping[str, Mapping[str, LazyConcat]], format: str, folder: Path) -> None:
    """The index that transformers reads where the weights are in several files."""
    if len(shards) > 1:
        total = sum(weight.nbytes for shard in shards.values() for weight in shard.values())
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{_BASENAMES[format]}.{format}.index.json", index)


def _output(file: str, shard: Mapping[str, LazyConcat], folder: Path) -> OutputFile:
    return pt_output(file, shard, folder) if file.endswith(".bin") else safetensors_output(file, shard)


def write_native_files(source: Source, folder: Path, dtype: str) -> ModelUse:
    """Writes all files but the weights: config.json of the transformers class, generation settings and tokenizer.

    Args:
        dtype: of the weights, as torch names it.
    """
    reference = source.reference_config
    hf = to_hf_config(source.config, dtype, None, None, reference.get("model_type", ""))
    write_json(folder / "config.json", hf)  # AutoTokenizer chooses its class by the model_type
    written = write_tokenizer(source.tokenizer, source.checkpoint.folder if source.checkpoint else None, folder)
    if written.tokenizer:
        hf |= {"bos_token_id": written.tokenizer.bos_id, "eos_token_id": written.tokenizer.eos_id}
    hf |= {key: reference.get(key, hf[key]) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = _generation_config(source, hf, written)
    if isinstance(hf["bos_token_id"], list):  # transformers takes several in generation_config.json alone
        hf["bos_token_id"] = next(iter(hf["bos_token_id"]), None)
    write_json(folder / "config.json", hf)
    write_json(folder / "generation_config.json", generation)
    return ModelUse(str(hf["architectures"][0]), tokenizer_class=written.opener or AUTO_TOKENIZER)


def _generation_config(source: Source, hf: dict[str, Any], written: WrittenTokenizer) -> dict[str, Any]:
    """The reference's, else the ids of config.json; with the tokens that end a turn in the model's chat template."""
    config: dict[str, Any] = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
    if source.reference and (source.reference / "generation_config.json").is_file():
        config = read_object(source.reference / "generation_config.json")
    known = as_id_list(config.get("eos_token_id")) or as_id_list(hf["eos_token_id"])
    if missing := [stop for stop in stop_ids(written.tokenizer, source.tokenizer) if stop not in known]:
        both = [*missing, *known]
        config["eos_token_id"] = both if len(both) > 1 else both[0]
    return config


def _write_reference_files(source: Source, folder: Path, dtype: str) -> ModelUse:
    """Copies the reference's files other than weights; its configuration gets the type of the written weights."""
    assert source.reference is not None
    copy_aux_files(source.reference, source.checkpoint.folder if source.checkpoint else None, folder)
    hf = read_object(folder / "config.json")
    key = "dtype" if "dtype" in hf else "torch_dtype"
    if key in hf and hf[key] != dtype:
        write_json(folder / "config.json", hf | {key: dtype})
    return ModelUse(str(hf["model_type"]), needs_code=True)
