"""Trains with the arguments of a Hugging Face script: `torchrun ... tools/finetune.py --model_name_or_path M ...`.

`fm9g train` does the same. Exit status: 0 success, 1 failure, 2 a mistake of the user, 130 interrupted.
"""

import sys

from fm9g.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
