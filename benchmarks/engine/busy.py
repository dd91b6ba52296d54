"""Training on CPUs beside other programs: `python benchmarks/engine/busy.py --spins default 0 2000 --busy 0 1`.

For each number of loops that keep a core busy and each GOMP_SPINCOUNT: the median tokens per second of training steps
of the model `tiny`, and its ratio to that of OpenMP's default on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 1024  # per step


def train(steps: int) -> float:
    """Tokens per second, after ten steps of warm-up."""
    import torch

    from fm9g.config.load import require_config
    from fm9g.config.model import load_model_config
    from fm9g.model.transformer import FM9G, Batch

    rng = random.Random(0)
    config = load_model_config(require_config("model_configs", "tiny"))
    model = FM9G(config).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        model.init_weight(name, weight, 0)

    def step() -> None:
        seqlens: list[int] = []
        while sum(seqlens) < TOKENS:
            seqlens.append(min(TOKENS - sum(seqlens), 1 + int(rng.lognormvariate(4.5, 1))))
        ids = torch.randint(0, config.vocab_size, (TOKENS,))
        borders = torch.tensor([0, *seqlens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in seqlens])
        rows = torch.arange(rng.randint(TOKENS // 2, TOKENS))
        model(Batch(ids, positions, borders, seqlens, rows, ids.roll(-1)[rows]))[0].backward()
        model.zero_grad()

    for _ in range(10):
        step()
    start = time.monotonic()
    for _ in range(steps):
        step()
    return steps * TOKENS / (time.monotonic() - start)


def measure(spins: str, steps: int) -> float:
    """`train` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if spins == "default" else {"GOMP_SPINCOUNT": spins})
    command = [sys.executable, __file__, "--train", str(steps)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="+", default=["default", "0", "2000"], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1], help="busy loops beside the training")
    parser.add_argument("--steps", type=int, default=16, help="of each run (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each case (%(default)s)")
    parser.add_argument("--train", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(train(options.train))
        return
    print("| busy loops | GOMP_SPINCOUNT | tokens/s | of the default when quiet |\n|---|---|---|---|")
    quiet = 0.0
    for busy in options.busy:
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            rates: dict[str, list[float]] = {spins: [] for spins in options.spins}
            for _ in range(options.runs):
                for spins, samples in rates.items():
                    samples.append(measure(spins, options.steps))
        finally:
            for loop in loops:
                loop.kill()
        for spins, samples in rates.items():
            rate = statistics.median(samples)
            quiet = quiet or rate
            print(f"| {busy} | {spins} | {rate:.0f} | {rate / quiet:.2f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
