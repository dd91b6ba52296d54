"""Plain text to jsonl: cat pretrain.txt | python convert_txt2jsonl.py > pretrain.jsonl"""

import sys

import checkout  # noqa: F401

from fm9g.cli import main

sys.exit(main(["data", "txt2jsonl", *sys.argv[1:]]))
