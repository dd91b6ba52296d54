"""The subcommand convert: Hugging Face folders to 9G files, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fm9g.errors import UserError


def add_convert_commands(subcommand: Any) -> None:
    """subcommand: puts a subcommand on the command line."""
    convert = subcommand(
        "convert", _convert, "a Hugging Face folder to a 9G .pt file, or a 9G checkpoint to such a folder"
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
        "--dtype", default="", choices=["bf16", "fp16", "fp32"], help="of the written weights; default: unchanged"
    )
    convert.add_argument(
        "--format",
        default="safetensors",
        choices=["safetensors", "bin"],
        help="of the weights in a folder (default: %(default)s)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a folder or files that are there")
    convert.add_argument(
        "--verify", action="store_true", help="then compare the logits of both sides in fp32; 2: they differ"
    )


def _convert(options: argparse.Namespace) -> int:
    from fm9g.checkpoint.find import resolve_checkpoint_path
    from fm9g.convert.hf import export_folder, import_folder
    from fm9g.io.path_kind import CHECKPOINT, MODEL, WEIGHTS, check_kind

    options.source = resolve_checkpoint_path(options.source)
    check_kind(options.source, MODEL, CHECKPOINT, WEIGHTS)
    try:
        if options.target.suffix == ".pt":
            if options.reference or options.keep_reference_config or options.format != "safetensors":
                raise UserError(
                    "convert: --reference, --keep-reference-config and --format are for folders of Hugging Face"
                )
            config = import_folder(options.source, options.target, options.overwrite, options.dtype)
            print(f"{options.target}: written; its model configuration is {config}")
        else:
            loads_as = export_folder(
                options.source,
                options.target,
                options.reference,
                options.dtype,
                options.overwrite,
                options.keep_reference_config,
                options.format,
            )
            how = "with the reference's code" if options.keep_reference_config else "with transformers"
            print(f"{options.target}: {loads_as}, loads {how}")
    except KeyboardInterrupt:
        print("fm9g: what is written is kept; the same command goes on from there", file=sys.stderr)
        raise
    return _verify(options) if options.verify else 0


def _verify(options: argparse.Namespace) -> int:
    from fm9g.config.model import load_model_config
    from fm9g.convert.hf import open_export_source
    from fm9g.convert.verify import verify

    if options.target.suffix == ".pt":
        config = load_model_config(options.target.with_suffix(".json")).value
        verdict = verify(options.source, options.target, config, options.dtype)
    else:
        model = open_export_source(options.source, options.reference)
        verdict = verify(options.target, model.file, model.config, options.dtype)
    print(f"{options.target}: {verdict}")
    return 0 if verdict.passed else 2
