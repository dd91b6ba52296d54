"""Speed and memory of opening a dataset of very many lines, and of random reads.

    python benchmarks/data/reading.py [--lines 100000000] [--folder /with/free/space]

The data file is sparse: it contains only the lines that are read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from common import report, table

LINE = 256  # bytes of each line


def make(folder: Path, lines: int, indices: np.ndarray) -> None:
    """Writes a dataset of lines of equal length, of which only those with these numbers have content."""
    line = json.dumps({"input": "", "output": "x" * 220})
    with (folder / "data.jsonl").open("wb") as data:
        data.truncate(lines * LINE)
        for number in indices.tolist():
            os.pwrite(data.fileno(), line.ljust(LINE - 1).encode() + b"\n", number * LINE)
    with h5py.File(folder / "index.h5", "w") as file:
        index = file.create_dataset("index", (lines + 1,), np.int64)
        for start in range(0, lines + 1, 10_000_000):
            end = min(start + 10_000_000, lines + 1)
            index[start:end] = np.arange(start, end) * LINE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000_000)
    parser.add_argument("--reads", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    indices = np.random.default_rng(0).integers(0, options.lines, options.reads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        child = os.fork()  # writing in a child, so that its memory does not count as that of reading
        if child == 0:
            make(Path(name), options.lines, indices)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        started = time.monotonic()
        from fm9g.data.load.indexed_dataset import IndexedDataset

        imported = time.monotonic() - started
        started = time.monotonic()
        dataset = IndexedDataset(name)
        opened = time.monotonic() - started
        started = time.process_time()
        for number in indices.tolist():
            dataset[number]
        seconds = time.process_time() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [
        ["importing and opening, seconds", f"{imported:.2f} + {opened:.4f}"],
        ["random reads per second and core", f"{options.reads / seconds:.0f}"],
        ["memory after them, MB", f"{memory / 1e6:.0f}"],
    ]
    report(f"A dataset of {options.lines:,} lines", table(["what", "result"], rows))


if __name__ == "__main__":
    main()
