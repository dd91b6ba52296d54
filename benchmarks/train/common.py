"""Shared by the benchmarks of training: data, a model, and runs whose metrics are read back."""

from __future__ import annotations

import contextlib
import io
import json
import random
import statistics
from pathlib import Path
from typing import Any

from fm9g.config.run import load_run
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.records import to_line
from fm9g.data.prepare.sources import find_sources
from fm9g.run_files import read_metrics
from fm9g.train.runner import run_training

_WORDS = "the quick brown fox jumps over lazy dogs while seven wizards quietly mix potions of many colours".split()  # noqa: SIM905


def prepare(folder: Path, model: dict[str, Any]) -> dict[str, str]:
    """Writes a dataset, a tokenizer and a model configuration. Returns the training keys of a run on them."""
    rng = random.Random(0)
    texts = [" ".join(rng.choice(_WORDS) for _ in range(rng.randint(20, 200))) for _ in range(2000)]
    (folder / "data.jsonl").write_bytes(b"".join(to_line({"input": "", "output": text}) for text in texts))
    build_index(find_sources([str(folder / "data.jsonl")]), folder / "indexed", IndexConfig("en"), 0)
    train_tokenizer(iter(texts), 320, folder / "tokenizer")
    (folder / "mixture.json").write_text(json.dumps([{"task_name": "words", "path": "indexed"}]))
    (folder / "model.json").write_text(json.dumps(model))
    return {
        "dataset_config": str(folder / "mixture.json"),
        "tokenizer_path": str(folder / "tokenizer"),
        "output_dir": str(folder / "out"),
        "device": "cpu",
        "dataloader_num_workers": "0",
        "overwrite": "true",
        "warmup_iters": "2",
        "peak_tflops": "1",
    }


def run(folder: Path, settings: dict[str, str]) -> list[dict[str, Any]]:
    """Trains. Returns the metrics of every logged step, with "seconds", the total time per step."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = run_training(load_run(str(folder / "model.json"), settings))
    lines = read_metrics(result.metrics_file)
    for line in lines:
        line["seconds"] = sum(value for key, value in line.items() if key.startswith("Time/"))
    return lines


def median(values: list[float]) -> float:
    return statistics.median(values)
