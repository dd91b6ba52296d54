"""A 9G .pt file to a Hugging Face folder; configuration and tokenizer come from the folder it was made from."""

import argparse
import sys

from fm9g.cli import main

parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--huggingface-ref-dir", required=True)
parser.add_argument("--bmtrain-ckpt-path", required=True)
parser.add_argument("--huggingface-save-dir", required=True)
parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: as in the .pt file")
parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")
options = parser.parse_args()
arguments = [
    "convert",
    options.bmtrain_ckpt_path,
    options.huggingface_save_dir,
    "--reference",
    options.huggingface_ref_dir,
]
if options.dtype:
    arguments += ["--dtype", options.dtype]
if options.overwrite:
    arguments.append("--overwrite")
sys.exit(main(arguments))
