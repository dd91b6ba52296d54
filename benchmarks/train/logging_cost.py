"""Measures the cost of metrics: log lines, TensorBoard, weight statistics, compared with a run that hardly logs.

The model is tiny, so that the cost stands out.

python benchmarks/train/logging_cost.py [--steps N] [--rounds N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import median, prepare, run

CASES = {
    "a line per 100 steps": {"log_iters": "100", "report_to": "none"},
    "a line per 10 steps": {"log_iters": "10", "report_to": "none"},
    "a line per step": {"log_iters": "1", "report_to": "none"},
    "a line per step, TensorBoard": {"log_iters": "1"},
    "all tasks, per step": {"log_iters": "1", "tensorboard_all_tasks": "true"},
    "statistics per 10 steps": {"log_iters": "10", "inspect_iters": "10"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = {"vocab_size": 320, "dim_model": 32, "dim_ff": 64, "num_layers": 2, "num_heads": 4, "half_type": "fp32"}
    seconds: dict[str, list[float]] = {title: [] for title in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = prepare(folder, model)
        settings |= {"train_iters": str(options.steps), "max_length": "64", "save": "false"}
        for _ in range(options.rounds):
            for title, changes in CASES.items():
                started = time.monotonic()
                run(folder, settings | changes)
                seconds[title].append((time.monotonic() - started) / options.steps)
    base = min(next(iter(seconds.values())))
    print(f"{'':<30}{'ms per step, minimum':>22}{'median':>10}{'more than the first':>22}")
    for title, values in seconds.items():
        minimum = min(values)  # other work on the machine only adds
        print(f"{title:<30}{minimum * 1000:>22.2f}{median(values) * 1000:>10.2f}{(minimum - base) * 1000:>19.2f} ms")


if __name__ == "__main__":
    main()
