"""Whether the memory of a long run stays what it was: `python tests/faults/campaign_memory.py --steps 2000`.

Trains a small model on documents of all lengths, with an evaluation every 50 steps and a data worker, in bf16 and in
fp32, and reads the resident memory of the training process and of its worker. Exit code 1 where either is more than
5 % above what it was after the first twentieth of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from faults import reports  # noqa: E402
from helpers.common import index_dataset, random_text, write_jsonl  # noqa: E402

from fm9g.data.encode.tokenizer_training import train_tokenizer  # noqa: E402

GROWTH = 0.05  # tolerated
REPORT = reports.FOLDER / "memory.md"
LONGEST = {"input": 60, "output": 120}  # words
MODEL = {
    "vocab_size": 400,
    "dim_model": 128,
    "dim_ff": 352,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_length": 512,
}


def prepare(folder: Path) -> None:
    """A dataset of pairs whose documents and targets have all lengths, a tokenizer and a mixture."""
    rng = random.Random(0)
    pairs = [{key: random_text(rng, rng.randint(1, length)) for key, length in LONGEST.items()} for _ in range(4000)]
    for name, part in (("data", pairs[:-50]), ("validation", pairs[-50:])):
        index_dataset(write_jsonl(folder / f"{name}.jsonl", part), folder / name, "en")
        (folder / f"{name}.json").write_text(json.dumps([{"task_name": name, "path": str(folder / name)}]))
    train_tokenizer((pair["output"] for pair in pairs), 400, folder / "tokenizer")


def resident(pid: int) -> float:
    """MB of memory that a process has to itself: anonymous pages, not those of files."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def children(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [grandchild for child in own for grandchild in children(child)]


def step_of(metrics: Path) -> int:
    """The last step that a run logged; 0 before the first one."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith("}") else 0


def soak(folder: Path, half_type: str, steps: int) -> dict[str, list[float]]:
    """For each kind of process its memory (MB) after a twentieth of the steps, and at the end."""
    (folder / "model.json").write_text(json.dumps(MODEL | {"half_type": half_type}))
    keys = {
        "config": folder / "model.json",
        "dataset_config": folder / "data.json",
        "val_dataset": folder / "validation.json",
        "tokenizer_path": folder / "tokenizer",
        "output_dir": folder / half_type,
        "train_iters": steps,
        "eval_iters": 50,
        "batch_size": 1,
        "max_length": 512,
        "dataloader_num_workers": 1,
        "save": "false",
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen([sys.executable, "-m", "fm9g", "train", *words], stdout=log, stderr=log)
    metrics = folder / half_type / "none"
    found: dict[str, list[float]] = {"training": [], "data worker": []}
    marks = [max(1, steps // 20), steps - max(1, steps // 20)]
    while marks and run.poll() is None:
        time.sleep(0.1)
        metrics = next(iter((folder / half_type).glob("logs/*/metrics.jsonl")), metrics)
        if step_of(metrics) >= marks[0]:
            marks.pop(0)
            found["training"].append(resident(run.pid))
            found["data worker"].append(max(map(resident, children(run.pid)), default=0.0))
    if run.wait() or marks:
        raise SystemExit((folder / "log").read_text(encoding="utf-8")[-2000:])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each run (%(default)s)")
    steps = parser.parse_args().steps
    rows, grown = [f"| {steps} steps | process | MB early | MB late | growth |", "|---|---|---|---|---|"], False
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for half_type in ("bf16", "fp32"):
            for kind, (early, late) in soak(Path(name), half_type, steps).items():
                growth = late / early - 1
                grown |= growth > GROWTH
                rows.append(f"| {half_type} | {kind} | {early:.0f} | {late:.0f} | {growth:+.1%} |")
                print(rows[-1], flush=True)
    REPORT.write_text("\n".join([*rows, ""]), encoding="utf-8")
    return int(grown)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.exit(main())
