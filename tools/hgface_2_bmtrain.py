"""A Hugging Face folder to a 9G .pt file, with the paths of the 9G guide as defaults."""

import argparse
import contextlib
import sys
from pathlib import Path

with contextlib.suppress(ImportError):  # a copy of this file elsewhere needs fm9g installed
    import checkout  # noqa: F401

from fm9g.cli import main

folder = Path(sys.argv[0]).absolute().parent.name
size = folder.removeprefix("fm9g_") if folder.startswith("fm9g_") else "7b"
parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
parser.add_argument("--huggingface-dir", default="./ckpt", help="(default: %(default)s)")
parser.add_argument("--bmtrain-ckpt-path", default=f"./9g_models/{size}.pt", help="FILE.pt (default: %(default)s)")
parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
options = parser.parse_args()
if not options.bmtrain_ckpt_path.endswith(".pt"):
    parser.error(f"--bmtrain-ckpt-path: found {options.bmtrain_ckpt_path!r}, expected a name that ends in .pt")
overwrite = ["--overwrite"] if options.overwrite else []
sys.exit(main(["convert", options.huggingface_dir, options.bmtrain_ckpt_path, *overwrite]))
