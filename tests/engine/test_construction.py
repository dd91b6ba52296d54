"""A model is built weight by weight: one rank of eight never holds all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine_harness import needs_bmtrain

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "engine" / "construction.py"


@pytest.mark.parametrize("engine", ["torch", pytest.param("bmtrain", marks=[needs_bmtrain, pytest.mark.slow])])
def test_one_rank_of_eight_builds_the_7b_model_in_a_fifth_of_its_size(engine: str) -> None:
    """With all widths and the vocabulary a twelfth, so that the ratios are those of the real model."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--engine", engine, "--scale", "0.08", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak"] < 0.2 * result["full"], result
    # fp32 shards, or bf16 shards: a smaller peak would mean that the measurement misses something.
    minimum = 1 / 8 if engine == "torch" else 1 / 16
    assert result["peak"] > 0.9 * minimum * result["full"], result
