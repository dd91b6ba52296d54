"""Small whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import make_records, small_model

from fm9g.config.run import load_run
from fm9g.log import log_to_console
from fm9g.train.runner import TrainResult, run_training

STEPS = 12


@pytest.fixture
def train(make_mixture: Callable[..., Path], tokenizer_path: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """train(out, key=value, ...): a run of a two-layer model with dropout on two small datasets of unequal lengths.

    An epoch of `few` ends between steps 1 and 7: the packers draw ahead at first, then what a step takes.
    """
    mixture = make_mixture({"few": make_records(50, 1), "many": make_records(150, 2)}, few={"abs_weight": 0.5})
    model = tmp_path / "model.json"
    model.write_text(json.dumps(small_model(dropout=0.1, scale=True, base_hidden_size=16).to_json()))

    def run(out: str, **changes: object) -> TrainResult:
        settings: dict[str, object] = {
            "config": model,
            "dataset_config": mixture,
            "tokenizer_path": tokenizer_path,
            "output_dir": tmp_path / out,
            "model_unique": "m",
            "train_iters": STEPS,
            "save_iters": STEPS,
            "batch_size": 2,
            "max_length": 64,
            "gradient_accumulation_steps": 2,
            "warmup_iters": 2,
            "dataloader_num_workers": 0,
            "peak_tflops": 1,
            "device": "cpu",
        }
        given = {**settings, **changes}
        with log_to_console():
            return run_training(load_run(str(model), {key: str(value) for key, value in given.items()}))

    return run
