"""A job from a run, and jobs that cannot be."""

import pytest

from fm9g.config.run import load_run
from fm9g.errors import UserError
from fm9g.plan.job import JobConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "x"},
        {"zero_level": 1},
        {"gpus": 0},
        {"gpus": 8, "tp_size": 3},
        {"gpus": 2, "tp_size": 2, "max_length": 5},
        {"engine": "bmtrain", "zero_level": 0},
        {"engine": "bmtrain", "gpus": 2, "tp_size": 2},
    ],
)
def test_a_setup_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(UserError):
        JobConfig(**wrong)


def test_a_setup_is_read_from_a_run() -> None:
    keys = {
        "use_checkpoint": "true",
        "global_batch_size": "64",
        "max_length": "2048",
        "zero_level": "2",
        "engine": "torch",
    }
    job = JobConfig.from_run(load_run("7b", keys, complete=False), nodes=2, gpus=8)
    assert job == JobConfig(
        nodes=2,
        gpus=8,
        zero_level=2,
        activation_checkpoint="full",
        max_length=2048,
        gradient_accumulation_steps=4,
        half_type="bf16",
    )
    assert JobConfig.from_run(load_run("7b", {}, complete=False), 1, 8).engine == "bmtrain"
    assert JobConfig.from_run(load_run("7b", {"tp_size": "2"}, complete=False), 1, 8).engine == "torch"
