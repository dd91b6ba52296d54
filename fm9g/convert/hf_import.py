"""Hugging Face folder -> 9G .pt file, a few megabytes at a time, whatever the size of the model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST
from fm9g.config.model import ModelConfig
from fm9g.convert.hf_reader import cast_weights, open_hf_folder
from fm9g.convert.resumable_writer import pt_output, resumable_dir, write_resumable
from fm9g.convert.source import WeightsCheck
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file
from fm9g.io.inputs import check_output, protect_inputs
from fm9g.io.lazy_tensor import LazyConcat
from fm9g.io.pt_file import open_pt
from fm9g.path_kind import MODEL_CONFIG, kind_of


@protect_inputs()
def import_folder(source: Path, target: Path, overwrite: bool = False, dtype: str = "") -> Path:
    """Writes the weights of a Hugging Face folder as a 9G .pt file, with its model configuration beside it.

    The same call resumes an interrupted import.

    Args:
        target: the .pt file.
        dtype: bf16, fp16 or fp32; empty: the weights' own.

    Returns:
        The configuration file, <target>.json.

    Raises:
        UserError: a weight has no 9G name, is missing, or does not fit the configuration.
    """
    if not source.is_dir():
        problem = "is a file" if source.exists() else "no such folder"
        raise UserError(f"{source}: {problem}; give a Hugging Face folder to convert to a .pt file")
    if (source / MANIFEST).is_file():
        raise UserError(f"{source}: is a 9G checkpoint; its .pt file is {Checkpoint(source).weight_file}")
    config, weights = open_hf_folder(source)
    return write_pt_model(config, weights, target, overwrite, dtype)


def write_pt_model(
    config: ModelConfig,
    weights: Mapping[str, LazyConcat],
    target: Path,
    overwrite: bool = False,
    dtype: str = "",
    check: WeightsCheck | None = None,
) -> Path:
    """Writes weights as a 9G .pt file, as `import_folder` does; returns the configuration file beside it.

    Args:
        check: gets the written weights before they replace the target; what it raises leaves the target as it was.
    """
    config_file = target.with_suffix(".json")
    _check_targets(target, config_file, overwrite)
    if dtype:
        config = dataclasses.replace(config, half_type=dtype)
    target = Path(os.path.realpath(target))
    # Both are on the disk before one rename follows the other, so that a kill hardly comes between.
    with atomic_file(target) as temporary, atomic_file(config_file) as new_config, resumable_dir(target) as folder:
        output = pt_output(target.name, cast_weights(weights, dtype), folder)
        write_resumable(folder, [output], "writing weights")
        if check:
            check({name: LazyConcat((part,), part.dtype) for name, part in open_pt(folder / output.name).items()})
        new_config.write_text(json.dumps(config.to_json(), indent=4), encoding="utf-8")
        (folder / output.name).rename(temporary)
        shutil.rmtree(folder)
    return config_file


def _check_targets(target: Path, config_file: Path, overwrite: bool) -> None:
    if config_file.is_file() and kind_of(config_file) != MODEL_CONFIG:
        raise UserError(
            f"{target}: its configuration would replace {config_file}, which is no model configuration of ours; choose "
            "another name"
        )
    for file in (target, config_file):
        check_output(file)
        if file.is_dir() or (file.exists() and not overwrite):
            raise UserError(f"{file}: exists already; choose another name, or replace it with --overwrite")
