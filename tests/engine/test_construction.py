"""A model is built a weight at a time: one rank of eight never holds all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engine_harness import needs_bmtrain

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "engine" / "construction.py"


@pytest.mark.parametrize(
    "engine",
    [
        "torch",
        pytest.param(
            "bmtrain",
            marks=[needs_bmtrain, pytest.mark.slow],
        ),
    ],
)
def test_one_rank_of_eight_builds_the_7b_model_in_a_fifth_of_its_size(engine: str) -> None:
    """With all widths and the vocabulary a twelfth, the shares of what is held are those of the real one."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--engine", engine, "--scale", "0.08", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < 0.2 * found["whole"], found
    least = (
        1 / 8 if engine == "torch" else 1 / 16
    )  # fp32 shards, bf16 shards: if less is seen, something is not measured
    assert found["peak"] > 0.9 * least * found["whole"], found
