"""Converts plain text to jsonl: cat pretrain.txt | python convert_txt2jsonl.py > pretrain.jsonl"""

import contextlib
import sys

with contextlib.suppress(ImportError):  # a copy of this file in another folder needs an installed fm9g
    import checkout  # noqa: F401

from fm9g.cli import main

if len(sys.argv) > 1:
    sys.exit(
        "convert_txt2jsonl.py takes no arguments and reads standard input: "
        "cat pretrain.txt | python convert_txt2jsonl.py > pretrain.jsonl"
    )
sys.exit(main(["data", "txt2jsonl"]))
