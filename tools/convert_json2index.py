"""Converts jsonl to an indexed dataset, as `fm9g data index` does.

python convert_json2index.py --path F.jsonl --language zh|en|code --output FOLDER
"""

import contextlib
import sys

with contextlib.suppress(ImportError):  # a copy of this file in another folder needs an installed fm9g
    import checkout  # noqa: F401

from fm9g.cli import main

sys.exit(main(["data", "index", *sys.argv[1:]]))
