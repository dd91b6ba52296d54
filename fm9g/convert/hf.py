"""Hugging Face folders in and out, a few megabytes at a time, whatever the size of the model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import MANIFEST, MODEL_CONFIG, Checkpoint
from fm9g.config.adapter import AdapterConfig
from fm9g.config.load import read_object
from fm9g.config.model import ModelConfig, architecture_of, load_model_config, values_differ
from fm9g.convert.aux_files import copy_aux_files, stop_ids, write_tokenizer
from fm9g.convert.families import FAMILIES, Family, family_of, to_hf_weights
from fm9g.convert.hf_config import from_hf_config, to_hf_config
from fm9g.convert.hf_reader import DTYPES, main_dtype, open_hf_folder, open_pt_weights
from fm9g.convert.model_card import model_card
from fm9g.convert.native_tokenizer import AUTO_TOKENIZER
from fm9g.convert.resumable_writer import OutputFile, pt_output, resumable_dir, safetensors_output, write_resumable
from fm9g.data.encode.tokenizer import as_id_list
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir, atomic_file
from fm9g.io.inputs import check_output, protect_inputs
from fm9g.io.lazy_tensor import LazyConcat, open_pt
from fm9g.io.path_kind import MODEL, TOKENIZER, check_kind, kind_of
from fm9g.io.path_kind import MODEL_CONFIG as MODEL_CONFIG_KIND
from fm9g.io.weights import check_weights
from fm9g.model.transformer import weight_shapes

SHARD_BYTES = 5 * 1000**3
FORMATS = ("safetensors", "bin")
WeightsCheck = Callable[[Mapping[str, LazyConcat]], None]


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A 9G model to be exported. file: of its weights. folder: the checkpoint it is from, None for a bare .pt file.
    tokenizer: the folder of its files, None where it is not known. adapter, base: of a merge, for its card."""

    file: Path
    config: ModelConfig
    folder: Path | None
    tokenizer: Path | None
    adapter: AdapterConfig | None = None
    base: Path | None = None


@protect_inputs()
def import_folder(source: Path, target: Path, overwrite: bool = False, dtype: str = "") -> Path:
    """Writes the weights of a Hugging Face folder as a 9G .pt file, and its model configuration beside it.

    dtype: bf16, fp16 or fp32; empty: the weights stay as they are.
    Returns the path of the configuration, <target>.json. Raises UserError where a weight has no 9G name or is missing;
    what was cut off, the same call goes on with.
    """
    if not source.is_dir():
        found = "a file" if source.exists() else "not there"
        raise UserError(f"{source}: is {found}; a .pt file is made from a Hugging Face folder")
    if (source / MANIFEST).is_file():
        raise UserError(f"{source}: a 9G checkpoint; its .pt file is {Checkpoint(source).weight_file}")
    return write_pt_model(*open_hf_folder(source), target, overwrite, dtype)


def write_pt_model(
    config: ModelConfig,
    weights: Mapping[str, LazyConcat],
    target: Path,
    overwrite: bool = False,
    dtype: str = "",
    check: WeightsCheck | None = None,
) -> Path:
    """Writes weights as a 9G .pt file, as import_folder does; returns the path of the configuration beside it.

    check: is given what was written, before it takes the place of the target.
    """
    config_file = target.with_suffix(".json")
    if config_file.is_file() and kind_of(config_file) != MODEL_CONFIG_KIND:
        raise UserError(
            f"{target}: its configuration would replace {config_file}, which is no model configuration of ours; choose "
            "another name"
        )
    for file in (target, config_file):
        check_output(file)
        if file.is_dir() or (file.exists() and not overwrite):
            raise UserError(f"{file}: is there already; choose another name or allow it to be replaced (--overwrite)")
    target = Path(os.path.realpath(target))
    # The two get their names one right after the other, when both are on the disk: a kill hardly comes between.
    with atomic_file(target) as temporary, atomic_file(config_file) as new_config, resumable_dir(target) as folder:
        weights = _cast(weights, dtype)
        if dtype:
            config = dataclasses.replace(config, half_type=dtype)
        output = pt_output(target.name, weights, folder)
        write_resumable(folder, [output], "writing weights")
        if check:
            check({name: LazyConcat((part,), part.dtype) for name, part in open_pt(folder / output.name).items()})
        new_config.write_text(json.dumps(config.to_json(), indent=4), encoding="utf-8")
        (folder / output.name).rename(temporary)
        shutil.rmtree(folder)
    return config_file


@protect_inputs()
def export_folder(
    source: Path,
    target: Path,
    reference: Path | None = None,
    dtype: str = "",
    overwrite: bool = False,
    keep_reference: bool = False,
    format: str = "safetensors",
) -> str:
    """Writes a 9G checkpoint folder or .pt file as a folder that transformers loads.

    reference: a Hugging Face folder whose configuration, tokenizer and generation settings travel along; without one
    they come from the checkpoint, or the configuration from <source>.json.
    dtype: bf16, fp16 or fp32; empty: the weights stay as they are.
    keep_reference: the folder gets the reference's own configuration, code, names and packing of weights, instead of
    those of the transformers class that needs no code. format: of the weights, one of FORMATS.
    Returns the class of transformers that loads it, or the model_type of the reference whose code does. Raises
    UserError; what was cut off, the same call goes on with.
    """
    if keep_reference and reference is None:
        raise UserError("--keep-reference-config: goes with --reference, the folder whose configuration is kept")
    model = open_export_source(source, reference)
    return write_hf_folder(model, open_pt_model(model), target, reference, dtype, overwrite, keep_reference, format)


def open_pt_model(model: ExportSource) -> dict[str, LazyConcat]:
    """The weights of a 9G .pt file, to be read one at a time. Raises UserError where they are not the model's."""
    stored = open_pt_weights(model.file)
    check_weights(stored, weight_shapes(model.config), str(model.file), strict=True)
    return {name: LazyConcat((tensor,), tensor.dtype) for name, tensor in stored.items()}


def write_hf_folder(
    model: ExportSource,
    weights: Mapping[str, LazyConcat],
    target: Path,
    reference: Path | None,
    dtype: str = "",
    overwrite: bool = False,
    keep_reference: bool = False,
    format: str = "safetensors",
    check: WeightsCheck | None = None,
) -> str:
    """Writes weights as export_folder does those of a file.

    model: what else is known of them. check: is given what was written, before it takes the place of the target.
    """
    target = Path(os.path.realpath(target))
    with atomic_dir(target, overwrite) as temporary, resumable_dir(target) as folder:
        weights = _cast(to_hf_weights(_layout(reference, keep_reference), model.config, weights), dtype)
        torch_dtype = str(main_dtype(weights)).removeprefix("torch.")
        if reference and keep_reference:
            loads_as, opener = _write_reference(reference, model.folder, temporary, torch_dtype), ""
        else:
            loads_as, opener = _write_native(model, reference, temporary, torch_dtype)
        card = model_card(model, temporary, target.name, loads_as, reference, keep_reference, opener or AUTO_TOKENIZER)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        _write_index(weights, format, temporary)
        outputs = _outputs(weights, format, folder)
        write_resumable(folder, outputs, "writing weights")
        for output in outputs:
            (folder / output.name).rename(temporary / output.name)
        if check:
            check(open_hf_folder(temporary)[1])
        shutil.rmtree(folder)
    return loads_as


def open_export_source(source: Path, reference: Path | None) -> ExportSource:
    """What is known of a checkpoint folder or .pt file. Raises UserError where that is not enough."""
    if reference is not None and not reference.is_dir():
        raise UserError(f"{reference}: no such folder; expected the Hugging Face folder that the model came from")
    if reference is not None:
        check_kind(reference, MODEL, TOKENIZER)
    if (source / "config.json").is_file() and not (source / MANIFEST).is_file():
        raise UserError(f"{source}: a Hugging Face folder; what is made from it is a 9G file, whose name ends in .pt")
    folder = Checkpoint(source, needs_optimizer=False) if source.is_dir() else None
    file = folder.weight_file if folder else source
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if not folder and (file.parent / MANIFEST).is_file():  # another file of a checkpoint, such as its .ema.pt
        folder = Checkpoint(file.parent, needs_optimizer=False)
    config_file = folder.folder / MODEL_CONFIG if folder else file.with_suffix(".json")
    if reference is None:
        if not config_file.is_file():
            raise UserError(
                f"{file}: its model configuration is not known; give the folder it came from with --reference"
            )
        config = load_model_config(config_file).value
    else:
        config = from_hf_config(read_object(reference / "config.json"), str(reference / "config.json"))
        if folder:  # a .pt file may have any .json beside it
            _check_same_architecture(load_model_config(config_file).value, config, config_file, reference)
    tokenizer = reference or (folder.tokenizer if folder else None)
    return ExportSource(file, config, folder.folder if folder else None, tokenizer)


def _check_same_architecture(own: ModelConfig, config: ModelConfig, config_file: Path, reference: Path) -> None:
    ours, theirs = architecture_of(own), architecture_of(config)
    if mismatched := [
        f"{key} is {ours[key]!r} there, {theirs[key]!r} here" for key in ours if values_differ(ours[key], theirs[key])
    ]:
        raise UserError(
            f"{reference / 'config.json'}: describes another model than {config_file}: {'; '.join(mismatched)}; "
            "leave --reference away, or give the folder that the model came from"
        )


def _layout(reference: Path | None, keep_reference: bool) -> Family:
    if reference is None or not keep_reference:
        return FAMILIES["llama"]
    return family_of(read_object(reference / "config.json"), str(reference / "config.json"))


def _cast(weights: Mapping[str, LazyConcat], dtype: str) -> dict[str, LazyConcat]:
    wanted = DTYPES.get(dtype)
    return {name: dataclasses.replace(weight, dtype=wanted or weight.dtype) for name, weight in weights.items()}


def _shards(weights: Mapping[str, LazyConcat], format: str) -> dict[str, dict[str, LazyConcat]]:
    """File name -> the weights in it."""
    shards: list[dict[str, LazyConcat]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    stem = _basename(format)
    if len(shards) == 1:
        return {f"{stem}.{format}": shards[0]}
    return {f"{stem}-{number:05d}-of-{len(shards):05d}.{format}": shard for number, shard in enumerate(shards, 1)}


def _basename(format: str) -> str:
    return "model" if format == "safetensors" else "pytorch_model"


def _outputs(weights: Mapping[str, LazyConcat], format: str, folder: Path) -> list[OutputFile]:
    shards = _shards(weights, format)
    if format == "safetensors":
        return [safetensors_output(file, shard) for file, shard in shards.items()]
    return [pt_output(file, shard, folder) for file, shard in shards.items()]


def _write_index(weights: Mapping[str, LazyConcat], format: str, folder: Path) -> None:
    shards = _shards(weights, format)
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in weights.values())
        where = {name: file for file, shard in shards.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / f"{_basename(format)}.{format}.index.json", index)


def _write_native(model: ExportSource, reference: Path | None, folder: Path, dtype: str) -> tuple[str, str]:
    """config.json of the native class, generation settings and tokenizer.

    Returns the class of transformers, and what opens the tokenizer.
    """
    like = read_object(reference / "config.json") if reference else {}
    hf = to_hf_config(model.config, dtype, None, None, like.get("model_type", ""))
    _write_json(folder / "config.json", hf)  # what opens a tokenizer depends on the kind of the model
    written = write_tokenizer(model.tokenizer, model.folder, folder)
    if written.tokenizer:
        hf |= {"bos_token_id": written.tokenizer.bos_id, "eos_token_id": written.tokenizer.eos_id}
    generation: dict[str, Any] = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
    if reference is not None:
        hf |= {key: like.get(key, hf[key]) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {key: hf[key] for key in ("bos_token_id", "eos_token_id")}
        if isinstance(hf["bos_token_id"], list):  # transformers takes several there, but not here
            hf["bos_token_id"] = next(iter(hf["bos_token_id"]), None)
        if (reference / "generation_config.json").is_file():
            generation = read_object(reference / "generation_config.json")
    # Generation ends where the template that the model was trained with ends a turn, too.
    known = as_id_list(generation.get("eos_token_id")) or as_id_list(hf["eos_token_id"])
    if missing := [stop for stop in stop_ids(written.tokenizer, model.tokenizer) if stop not in known]:
        both = [*missing, *known]
        generation["eos_token_id"] = both if len(both) > 1 else both[0]
    _write_json(folder / "config.json", hf)
    _write_json(folder / "generation_config.json", generation)
    return str(hf["architectures"][0]), written.opener


def _write_reference(reference: Path, checkpoint: Path | None, folder: Path, dtype: str) -> str:
    """What the reference holds beside its weights."""
    copy_aux_files(reference, checkpoint, folder)
    hf = read_object(reference / "config.json")
    key = "dtype" if "dtype" in hf else "torch_dtype"
    if key in hf and hf[key] != dtype:
        hf[key] = dtype
        _write_json(folder / "config.json", hf)
    return str(hf["model_type"])


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
