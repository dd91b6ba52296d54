"""The subcommand convert: Hugging Face folder -> 9G file, and back."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from fm9g.errors import UserError

logger = logging.getLogger(__name__)


def add_convert_commands(subcommand: Any) -> None:
    """Adds `fm9g convert`. subcommand: adds one to the command line."""
    convert = subcommand(
        "convert", _convert, "convert a Hugging Face folder to a 9G .pt file, or a 9G checkpoint to such a folder"
    )
    convert.add_argument(
        "source", type=Path, help="a Hugging Face folder, a checkpoint (RUN/STEP, RUN/best, RUN/last), or a .pt file"
    )
    convert.add_argument("target", type=Path, help="FILE.pt for a 9G file, else a new Hugging Face folder")
    convert.add_argument("--reference", type=Path, help="Hugging Face folder to take configuration and tokenizer from")
    convert.add_argument(
        "--keep-reference-config",
        action="store_true",
        help="write the reference's own config.json, code, names and packing of weights, as remote code needs them",
    )
    convert.add_argument(
        "--dtype", default="", choices=["bf16", "fp16", "fp32"], help="type of the written weights; default: unchanged"
    )
    convert.add_argument(
        "--format",
        default="safetensors",
        choices=["safetensors", "bin"],
        help="format of the weights in a folder (default: %(default)s)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a folder or files that exist")
    convert.add_argument(
        "--verify",
        action="store_true",
        help="afterwards compare the logits of both sides in fp32; exit with 2 if they differ",
    )


def _convert(options: argparse.Namespace) -> int:
    from fm9g.checkpoint.find import resolve_checkpoint_path
    from fm9g.path_kind import CHECKPOINT, MODEL, WEIGHTS, check_kind

    options.source = resolve_checkpoint_path(options.source)
    check_kind(options.source, MODEL, CHECKPOINT, WEIGHTS)
    try:
        _import(options) if options.target.suffix == ".pt" else _export(options)
    except KeyboardInterrupt:
        logger.info("fm9g: the partial output stays on disk; the same command resumes from there")
        raise
    return _verify(options) if options.verify else 0


def _import(options: argparse.Namespace) -> None:
    from fm9g.convert.hf_import import import_folder

    if options.reference or options.keep_reference_config or options.format != "safetensors":
        raise UserError("convert: --reference, --keep-reference-config and --format are for Hugging Face folders")
    config = import_folder(options.source, options.target, options.overwrite, options.dtype)
    print(f"{options.target}: written; its model configuration is {config}")


def _export(options: argparse.Namespace) -> None:
    from fm9g.convert.hf_export import ExportOptions, export_folder

    export = ExportOptions(options.dtype, options.overwrite, options.keep_reference_config, options.format)
    loads_as = export_folder(options.source, options.target, options.reference, export)
    loader = "the reference's code" if options.keep_reference_config else "transformers"
    print(f"{options.target}: {loads_as}, loads with {loader}")


def _verify(options: argparse.Namespace) -> int:
    from fm9g.config.model import load_model_config
    from fm9g.convert.source import open_9g_source, open_9g_weights
    from fm9g.convert.verify import verify

    if options.target.suffix == ".pt":
        config = load_model_config(options.target.with_suffix(".json"))
        diff = verify(options.source, config, open_9g_weights(options.target, config), options.dtype)
    else:
        source = open_9g_source(options.source, options.reference)
        diff = verify(options.target, source.config, source.weights, options.dtype)
    print(f"{options.target}: {diff}")
    return 0 if diff.passed else 2
