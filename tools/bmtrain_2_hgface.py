"""A 9G .pt file to a Hugging Face folder; configuration and tokenizer come from the folder it was made from.

With --lora-ckpt-path, the .pt file is the base of an adapter, and the folder gets both in one.
"""

import argparse
import contextlib
import sys

with contextlib.suppress(ImportError):  # a copy of this file elsewhere needs fm9g installed
    import checkout  # noqa: F401

from fm9g.cli import main

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
)
parser.add_argument("--huggingface-ref-dir", required=True)
parser.add_argument("--bmtrain-ckpt-path", required=True)
parser.add_argument("--huggingface-save-dir", required=True)
parser.add_argument("--lora-ckpt-path", help="the .pt file of an adapter, or its checkpoint")
parser.add_argument("--lora-config-path", help="the file of train_configs/ that the adapter was trained with")
parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: as in the .pt file")
parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")
options = parser.parse_args()
if options.lora_config_path and not options.lora_ckpt_path:
    parser.error("--lora-config-path: goes with --lora-ckpt-path")
if options.huggingface_save_dir.endswith(".pt"):
    parser.error(f"--huggingface-save-dir: found {options.huggingface_save_dir!r}, expected the name of a folder")
lora = options.lora_ckpt_path
arguments = ["lora", "merge", options.bmtrain_ckpt_path, lora] if lora else ["convert", options.bmtrain_ckpt_path]
arguments += [options.huggingface_save_dir, "--reference", options.huggingface_ref_dir]
if options.lora_config_path:
    arguments += ["--train-config", options.lora_config_path]
if options.dtype:
    arguments += ["--dtype", options.dtype]
if options.overwrite:
    arguments.append("--overwrite")
sys.exit(main(arguments))
