"""Whole runs in several processes, as `fm9g train` starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.common import make_records, small_model

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.steps import list_steps
from fm9g.cli import main

Fm9g = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def fm9g(tmp_path: Path, make_mixture: Callable[..., Path], tokenizer_path: Path) -> Fm9g:
    mixture = make_mixture({"few": make_records(50, 1), "many": make_records(150, 2)})
    (tmp_path / "m.json").write_text(json.dumps(small_model().to_json()))
    fixed = f"--config m.json --dataset_config {mixture} --tokenizer_path {tokenizer_path} --device cpu --max_length 64"
    lengths = "--batch_size 2 --global_batch_size 4 --train_iters 6 --warmup_iters 2 --dataloader_num_workers 0"

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fm9g", "train", *fixed.split(), *lengths.split(), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


def loaded(folder: Path) -> tuple[dict, dict, dict, dict]:
    checkpoint = Checkpoint(folder)
    return checkpoint.weights(), checkpoint.optimizer(), checkpoint.loader_state(), checkpoint.trainer_state()


def test_two_processes_and_then_one_are_the_run_of_one_alone(
    fm9g: Fm9g, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = fm9g("--model_unique", "parts", "--nproc", 2, "--stop_iters", 3)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    arguments = [str(argument) for argument in done.args[3:]]
    shared = arguments[: arguments.index("--model_unique")]
    assert main([*shared, "--model_unique", "parts", "--resume", "auto"]) == 0
    assert main([*shared, "--model_unique", "alone"]) == 0
    checkpoints = tmp_path / "data" / "checkpoints"
    assert list_steps(checkpoints / "parts") == [3, 6]
    alone, parts = loaded(checkpoints / "alone" / "6"), loaded(checkpoints / "parts" / "6")
    assert parts[3].pop("loss") == pytest.approx(alone[3].pop("loss"), abs=1e-5)
    assert alone[2:] == parts[2:]  # the data position and all counts, exactly
    for one, other in zip(alone[:2], parts[:2]):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)


def test_a_mistake_in_one_place_is_one_message(fm9g: Fm9g, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    done = fm9g("--nproc", 2)
    assert done.returncode == 2
    assert done.stderr.count("fm9g:") == 1, done.stderr
    assert "Traceback" not in done.stderr
    done = fm9g("--nproc", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fm9g: global_batch_size 4 cannot be divided among 3 replicas; possible: [1, 2, 4]\n"
