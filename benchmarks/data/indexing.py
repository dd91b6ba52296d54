"""Indexing a large .jsonl file, compared with `cp`, the loop of the published converter, and datasets.load_dataset.

    python benchmarks/data/indexing.py [--gigabytes 2] [--folder /somewhere/with/room] [--baselines cp loop datasets]

Prints a Markdown table: seconds, MB/s, maximum memory of all processes together, and speed relative to the loop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import Measured, measured, records_of, report, table

from fm9g.io.append import AppendWriter

LOOP = """
import json, sys
import h5py
source, output = sys.argv[1:]
characters, ends, position, lines = 0, [], 0, 0
with open(source, encoding="utf-8") as file, open(output + "/data.jsonl", "w", encoding="utf-8") as copy:
    while line := file.readline():
        if not lines:
            json.loads(line)
        lines += 1
        characters += len(line)
        position += len(line.encode())
        ends.append(position)
        copy.write(line)
with open(output + "/index", "w") as file:
    file.write("\\n".join(map(str, ends)))
with h5py.File(output + "/index.h5", "w") as file:
    file.create_dataset("index", data=ends)
"""

DATASETS = """
import sys
import datasets
datasets.load_dataset("json", data_files=sys.argv[1], cache_dir=sys.argv[2])
"""


def make_source(path: Path, size: int) -> None:
    """Writes real records repeatedly until the file has `size` bytes."""
    block = b"".join(records_of("alpaca_zh_demo.json", "alpaca_en_demo.json", "wiki_demo.txt"))
    with AppendWriter(path, buffer_bytes=4 << 20) as file:
        for _ in range(max(1, size // len(block))):
            file.write(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--baselines", nargs="*", default=["cp", "loop", "datasets"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = folder / "source.jsonl"
        make_source(source, int(options.gigabytes * 1e9))
        megabytes = source.stat().st_size / 1e6
        commands = {
            "cp": f"cp {source} {folder}/out/data.jsonl && sync {folder}/out/data.jsonl",
            "loop": [sys.executable, "-c", LOOP, str(source), str(folder / "out")],
            "datasets": [sys.executable, "-c", DATASETS, str(source), str(folder / "out")],
        }
        results: dict[str, Measured] = {}
        for baseline in options.baselines:
            (folder / "out").mkdir()
            results[baseline] = measured(commands[baseline])
            shutil.rmtree(folder / "out")
        for workers in options.workers:
            arguments = [
                "--path",
                str(source),
                "--language",
                "zh",
                "--output",
                str(folder / "out"),
                "--workers",
                str(workers),
            ]
            results[f"fm9g data index, {workers} workers"] = measured(
                [sys.executable, "-m", "fm9g", "data", "index", *arguments]
            )
            lines = json.loads((folder / "out" / "meta.json").read_text())["nlines"]
            shutil.rmtree(folder / "out")
    rows = []
    for command, result in results.items():
        ratio = f"{results['loop'].seconds / result.seconds:.1f}" if "loop" in results else ""
        speed = f"{megabytes / result.seconds:.0f}"
        rows.append([command, f"{result.seconds:.1f}", speed, f"{result.memory_bytes / 1e6:.0f}", ratio])
    head = ["command", "seconds", "MB/s", "memory, MB", "x the loop"]
    report(f"Indexing {megabytes / 1000:.1f} GB, {lines} lines", table(head, rows))


if __name__ == "__main__":
    main()
