"""The subcommands of adapters: fm9g lora show, merge, combine, export, import."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.text_table import text_table

logger = logging.getLogger(__name__)

_ADAPTER_HELP = "a checkpoint, a .pt file of an adapter, or a folder of `fm9g lora combine` or of PEFT"


def add_lora_commands(subcommand: Any, group: Any) -> None:
    """Adds `fm9g lora` and its subcommands. subcommand, group: add one to the command line."""
    lora = group("lora", "show, merge, combine, export, import: LoRA adapters")

    show = subcommand("show", _show, "show an adapter's configuration, after checking its files", parent=lora)
    show.add_argument("adapter", type=Path, help=_ADAPTER_HELP)
    _add_train_config(show)

    _add_merge(subcommand, lora)

    combine = subcommand("combine", _combine, "write one adapter that is the weighted sum of several", parent=lora)
    combine.add_argument("adapters", type=Path, nargs="+", help=_ADAPTER_HELP)
    combine.add_argument("--weights", type=float, nargs="+", help="one for each adapter (default: 1 for all)")
    combine.add_argument("--out", type=Path, required=True, help="folder for the new adapter")
    _add_overwrite(combine)

    export = subcommand("export", _export, "write an adapter in PEFT's layout, for the exported base", parent=lora)
    export.add_argument("adapter", type=Path, help=_ADAPTER_HELP)
    export.add_argument("target", type=Path, help="a new folder")
    export.add_argument("--peft", action="store_true", help="the layout; it is the only one and may be left out")
    export.add_argument(
        "--base",
        default="",
        help="named as the base in its configuration: a Hugging Face folder, or ORG/NAME of a hub (default: the base "
        "it was trained on)",
    )
    _add_overwrite(export)
    _add_train_config(export)

    take = subcommand("import", _import, "write a PEFT adapter as a 9G one", parent=lora)
    take.add_argument("source", type=Path, help="a PEFT folder")
    take.add_argument("target", type=Path, help="a new folder")
    take.add_argument(
        "--base", type=Path, help="the model it was trained on; its hash is recorded, and merging then requires it"
    )
    _add_overwrite(take)


def _add_merge(subcommand: Any, lora: Any) -> None:
    merge = subcommand("merge", _merge, "merge an adapter into its base and write the merged model", parent=lora)
    merge.add_argument(
        "base", type=Path, help="the model it was trained on: a .pt file, a checkpoint, a Hugging Face folder"
    )
    merge.add_argument("adapter", type=Path, help=_ADAPTER_HELP)
    merge.add_argument("target", type=Path, help="FILE.pt for a 9G file, else a new Hugging Face folder")
    merge.add_argument("--reference", type=Path, help="Hugging Face folder to take configuration and tokenizer from")
    merge.add_argument(
        "--dtype", default="", choices=["bf16", "fp16", "fp32"], help="type of the written weights; default: the base's"
    )
    _add_overwrite(merge)
    merge.add_argument(
        "--no-verify", action="store_true", help="do not compare the merged model's logits with base and adapter apart"
    )
    _add_train_config(merge)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace a folder or file that exists")


def _add_train_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train-config",
        type=Path,
        help="file of train_configs/ with its r and alpha, for a .pt file that has no adapter_config.json beside it",
    )


def _show(options: argparse.Namespace) -> None:
    from fm9g.convert.adapters import read_adapter

    adapter = read_adapter(options.adapter, options.train_config)
    count = sum(weight.numel() for weight in adapter.weights.values())
    print(f"{adapter.path}: {len(adapter.layers)} layers, {count:,} parameters, scaling {adapter.config.scaling:g}")
    print("\n".join(text_table([(f"  {key}", repr(value)) for key, value in adapter.config.to_json().items()])))


def _merge(options: argparse.Namespace) -> None:
    from fm9g.convert.adapters import read_adapter
    from fm9g.convert.merge import merge

    adapter = read_adapter(options.adapter, options.train_config)
    report = merge(
        options.base,
        adapter,
        options.target,
        reference=options.reference,
        dtype=options.dtype,
        overwrite=options.overwrite,
        verify=not options.no_verify,
    )
    print(f"{options.target}: {report.written}, with {len(adapter.layers)} layers of {adapter.path} merged")
    if not options.no_verify:
        print(
            f"largest logit {report.max_logit:.2f}; the adapter changes logits by up to {report.max_change:.2e}\n"
            f"merged logits differ from those of base and adapter apart by {report.merge_error:.2e} in fp32, and by "
            f"{report.rounding_error:.2e} as written"
        )
    if report.rounding_error > 0.5 * report.max_change:
        logger.warning("rounding changes the model as much as the adapter does; --dtype fp32 avoids that")


def _combine(options: argparse.Namespace) -> None:
    from fm9g.convert.adapters import read_adapter
    from fm9g.lora.adapter_file import combine, save_adapter

    coefficients = options.weights or [1.0] * len(options.adapters)
    if len(coefficients) != len(options.adapters):
        raise UserError(f"--weights: {len(coefficients)} for {len(options.adapters)} adapters; give one for each")
    adapter = combine([read_adapter(path) for path in options.adapters], coefficients)
    save_adapter(adapter, options.out, options.overwrite)
    print(f"{options.out}: rank {adapter.config.r}, from {' + '.join(adapter.config.made_from)}")


def _export(options: argparse.Namespace) -> None:
    from fm9g.convert.adapters import read_adapter
    from fm9g.convert.peft import write_peft

    adapter = read_adapter(options.adapter, options.train_config)
    write_peft(adapter, options.target, options.base, options.overwrite)
    print(f"{options.target}: loads with peft.PeftModel.from_pretrained on {options.base or 'the exported base'}")
    if adapter.saved_modules:
        print("with new tokens, resize the embeddings of the base first; README.md there has the lines")


def _import(options: argparse.Namespace) -> None:
    from fm9g.convert.adapters import import_peft

    config = import_peft(options.source, options.target, options.base, options.overwrite)
    base = f"base {config.base_sha256[:16]}" if config.base_sha256 else "its base is unknown (--base records it)"
    print(f"{options.target}: rank {config.r}, scaling {config.scaling:g}; {base}")
