"""Measures the speed of training with and without packing, in turn, on the records of one file.

The model is that of the size "tiny". Its tokenizer is trained on the file.

python benchmarks/train/packing.py FILE [--steps N] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from common import median

from fm9g.config.run import load_run
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import find_sources
from fm9g.data.prepare.texts import iter_texts
from fm9g.train.runner import run_training

VOCAB_SIZE = 4096  # of the model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="anything that `fm9g data index` reads")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tokens_per_second: dict[str, list[float]] = {"true": [], "false": []}
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder, sources = Path(name), find_sources([options.file])
        build_index(sources, folder / "indexed", IndexConfig("zh"), 0)
        train_tokenizer(iter_texts(sources), VOCAB_SIZE, folder / "tokenizer")
        (folder / "mixture.json").write_text(json.dumps([{"task_name": "records", "path": "indexed"}]))
        settings = {
            "dataset_config": str(folder / "mixture.json"),
            "tokenizer_path": str(folder / "tokenizer"),
            "output_dir": str(folder / "out"),
            "batch_size": "8",
            "max_length": "512",
            "train_iters": str(options.steps),
            "device": "cpu",
            "save": "false",
            "overwrite": "true",
            "report_to": "none",
        }
        for _ in range(options.rounds):
            for packing, speeds in tokens_per_second.items():
                result = run_training(load_run("tiny", settings | {"packing": packing}))
                speeds.append(result.tokens / result.seconds)
    packed, unpacked = map(median, tokens_per_second.values())
    print(f"tokens per second, median: packing true {packed:.0f}, false {unpacked:.0f}, {unpacked / packed:.2f} of it")


if __name__ == "__main__":
    main()
