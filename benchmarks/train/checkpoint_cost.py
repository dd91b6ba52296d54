"""Measures how long a checkpoint blocks training: written synchronously, and in the background (async_save).

python benchmarks/train/checkpoint_cost.py [--layers N] [--width C] [--folder DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import median, prepare, run

STEPS, SAVE_ITERS = 32, 6
CASES: dict[str, dict[str, str]] = {
    "no checkpoints": {"save": "false"},
    "synchronous": {},
    "background (async_save)": {"async_save": "true"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per step")
    parser.add_argument("--folder", type=Path, default=None, help="a folder on the disk to measure")
    options = parser.parse_args()
    model = {
        "vocab_size": 8000,
        "dim_model": options.width,
        "dim_ff": 3 * options.width,
        "num_layers": options.layers,
        "num_heads": options.width // 64,
        "half_type": "fp32",
        "max_length": options.tokens,
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        settings = prepare(folder, model)
        settings |= {"train_iters": str(STEPS), "max_length": str(options.tokens), "save_iters": str(SAVE_ITERS)}
        rows = []
        # The last save of a run is left out: the run waits for it in any case.
        for title, changes in CASES.items():
            lines = run(folder, settings | changes)[2:]
            saves = [line for line in lines if line["step"] % SAVE_ITERS == 0 and line["step"] < STEPS]
            plain = median([line["seconds"] - line["Time/checkpoint"] for line in lines])
            # A step is logged before its checkpoint is saved: the blocked time is in the next line.
            blocked = [lines[i + 1]["Time/checkpoint"] for i, line in enumerate(lines[:-1]) if line in saves]
            rows.append((title, plain, blocked))
        file = folder / "out" / "checkpoints" / "model" / str(STEPS)
        size = sum(part.stat().st_size for part in file.rglob("*") if part.is_file())
    step = rows[0][1]
    print(f"checkpoint: {size / 1e6:.0f} MB; step without checkpoints: {step:.2f} s")
    print(f"{'':<24}{'blocked by each save (s)':<34}{'in steps':>10}{'median step (s)':>18}{'ratio':>8}")
    for title, plain, blocked in rows:
        seconds = ", ".join(f"{value:.2f}" for value in blocked) or "-"
        steps = f"{median(blocked) / step:.2f}" if any(blocked) else "-"
        print(f"{title:<24}{seconds:<34}{steps:>10}{plain:>18.2f}{plain / step:>8.2f}")


if __name__ == "__main__":
    main()
