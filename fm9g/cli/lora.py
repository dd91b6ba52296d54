"""The subcommands of adapters: fm9g lora show, merge, combine, export, import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fm9g.errors import UserError


def add_lora_commands(subcommand: Any, group: Any) -> None:
    """subcommand, group: put a subcommand, or a group of them, on the command line."""
    lora = group("lora", "show, merge, combine, export, import: LoRA adapters")
    what = "a checkpoint, a .pt file of an adapter, or a folder of `fm9g lora combine` or of PEFT"

    show = subcommand("show", _show, "what an adapter is, and whether its parts belong together", parent=lora)
    show.add_argument("adapter", type=Path, help=what)
    _add_train_config(show)

    merge = subcommand("merge", _merge, "the base with an adapter in its weights, as a model of its own", parent=lora)
    merge.add_argument(
        "base", type=Path, help="what it was trained on: a .pt file, a checkpoint, a Hugging Face folder"
    )
    merge.add_argument("adapter", type=Path, help=what)
    merge.add_argument("target", type=Path, help="FILE.pt for a 9G file, else a new Hugging Face folder")
    merge.add_argument("--reference", type=Path, help="Hugging Face folder to take configuration and tokenizer from")
    merge.add_argument(
        "--dtype", default="", choices=["bf16", "fp16", "fp32"], help="of the written weights; default: the base's"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace a folder or file that is there")
    merge.add_argument(
        "--no-verify", action="store_true", help="do not compare logits of base and adapter with those of the model"
    )
    _add_train_config(merge)

    combine = subcommand("combine", _combine, "one adapter that is the weighted sum of several", parent=lora)
    combine.add_argument("adapters", type=Path, nargs="+", help=what)
    combine.add_argument("--weights", type=float, nargs="+", help="one for each adapter (default: 1 for all)")
    combine.add_argument("--out", type=Path, required=True, help="folder for the new adapter")
    combine.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")

    export = subcommand("export", _export, "an adapter in PEFT's layout, which loads on the exported base", parent=lora)
    export.add_argument("adapter", type=Path, help=what)
    export.add_argument("target", type=Path, help="a new folder")
    export.add_argument("--peft", action="store_true", help="the layout; it is the only one, and may be left away")
    export.add_argument(
        "--base",
        default="",
        help="what its configuration names as the base: a Hugging Face folder, or ORG/NAME of a hub (default: as "
        "trained on)",
    )
    export.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")
    _add_train_config(export)

    take = subcommand("import", _import, "an adapter of PEFT's as a 9G one", parent=lora)
    take.add_argument("source", type=Path, help="a folder of PEFT")
    take.add_argument("target", type=Path, help="a new folder")
    take.add_argument("--base", type=Path, help="what it was trained on, whose hash is kept: merging asks for that one")
    take.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")


def _add_train_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train-config",
        type=Path,
        help="file of train_configs/ with its r and alpha, for a .pt file that has no adapter_config.json beside it",
    )


def _show(options: argparse.Namespace) -> None:
    from fm9g.convert.merge import read_adapter

    adapter = read_adapter(options.adapter, options.train_config)
    numbers = sum(weight.numel() for weight in adapter.weights.values())
    print(f"{adapter.path}: {len(adapter.layers)} layers, {numbers:,} parameters, scaling {adapter.config.scaling:g}")
    for key, value in adapter.config.to_json().items():
        print(f"  {key:<24} {value!r}")


def _merge(options: argparse.Namespace) -> None:
    from fm9g.convert.merge import merge, read_adapter

    adapter = read_adapter(options.adapter, options.train_config)
    found = merge(
        options.base,
        adapter,
        options.target,
        reference=options.reference,
        dtype=options.dtype,
        overwrite=options.overwrite,
        verify=not options.no_verify,
    )
    print(f"{options.target}: {found.written}, with {len(adapter.layers)} layers of {adapter.path} in it")
    if not options.no_verify:
        print(f"logits of up to {found.max_logit:.2f}, which the adapter changes by up to {found.max_change:.2e}")
        print(
            f"merged, they differ from those of base and adapter apart by {found.merge_error:.2e} in fp32, and by "
            f"{found.rounding_error:.2e} as written"
        )
    if found.rounding_error > 0.5 * found.max_change:
        print("note: rounding changes as much as the adapter does; --dtype fp32 keeps it")


def _combine(options: argparse.Namespace) -> None:
    from fm9g.convert.merge import read_adapter
    from fm9g.lora.adapter_file import combine, save_adapter

    shares = options.weights or [1.0] * len(options.adapters)
    if len(shares) != len(options.adapters):
        raise UserError(f"--weights: {len(shares)} for {len(options.adapters)} adapters; give one for each")
    adapter = combine([read_adapter(path) for path in options.adapters], shares)
    save_adapter(adapter, options.out, options.overwrite)
    print(f"{options.out}: rank {adapter.config.r}, from {' + '.join(adapter.config.made_from)}")


def _export(options: argparse.Namespace) -> None:
    from fm9g.convert.merge import read_adapter
    from fm9g.convert.peft import write_peft

    write_peft(read_adapter(options.adapter, options.train_config), options.target, options.base, options.overwrite)
    print(f"{options.target}: loads with peft.PeftModel.from_pretrained on {options.base or 'the exported base'}")


def _import(options: argparse.Namespace) -> None:
    from fm9g.convert.merge import import_peft

    config = import_peft(options.source, options.target, options.base, options.overwrite)
    known = f"base {config.base_sha256[:16]}" if config.base_sha256 else "its base is not known: --base would keep it"
    print(f"{options.target}: rank {config.r}, scaling {config.scaling:g}; {known}")
