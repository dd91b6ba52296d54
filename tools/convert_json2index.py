"""jsonl to an indexed dataset: python convert_json2index.py --path F.jsonl --language zh|en|code --output FOLDER"""

import contextlib
import sys

with contextlib.suppress(ImportError):  # a copy of this file elsewhere needs fm9g installed
    import checkout  # noqa: F401

from fm9g.cli import main

sys.exit(main(["data", "index", *sys.argv[1:]]))
