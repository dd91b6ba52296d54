"""How long a checkpoint holds a run up: written at once, and beside the training.

python benchmarks/train/checkpoint_cost.py [--layers N] [--width C] [--folder DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import median, prepare, run

STEPS, EVERY = 32, 6
CASES: dict[str, dict[str, str]] = {
    "no checkpoints": {"save": "false"},
    "at once": {},
    "beside (async_save)": {"async_save": "true"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk that is to be measured")
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
        settings |= {"train_iters": str(STEPS), "max_length": str(options.tokens), "save_iters": str(EVERY)}
        rows = []
        # At the end each run waits for what is being written; the steps before are the ones that count.
        for title, changes in CASES.items():
            lines = run(folder, settings | changes)[2:]
            saves = [line for line in lines if line["step"] % EVERY == 0 and line["step"] < STEPS]
            plain = median([line["seconds"] - line["Time/checkpoint"] for line in lines])
            # A step's line is written before its checkpoint: the hold-up is in the line after.
            held = [lines[i + 1]["Time/checkpoint"] for i, line in enumerate(lines[:-1]) if line in saves]
            rows.append((title, plain, held))
        file = folder / "out" / "checkpoints" / "model" / str(STEPS)
        size = sum(part.stat().st_size for part in file.rglob("*") if part.is_file())
    step = rows[0][1]
    print(f"a checkpoint: {size / 1e6:.0f} MB; a step without any: {step:.2f} s")
    print(f"{'':<22}{'hold-up of each save (s)':<34}{'in steps':>10}{'median step (s)':>18}{'ratio':>8}")
    for title, plain, held in rows:
        seconds = ", ".join(f"{value:.2f}" for value in held) or "-"
        steps = f"{median(held) / step:.2f}" if any(held) else "-"
        print(f"{title:<22}{seconds:<34}{steps:>10}{plain:>18.2f}{plain / step:>8.2f}")


if __name__ == "__main__":
    main()
