"""An estimate as a table."""

from helpers.plan_models import shipped

from fm9g.hardware import GIB, GPUS
from fm9g.plan.estimate import estimate_job
from fm9g.plan.job import JobConfig
from fm9g.plan.render import format_table


def test_every_component_is_in_the_table() -> None:
    estimate = estimate_job(shipped("7b"), JobConfig(gpus=8), GPUS["H200"])
    text = format_table(estimate)
    assert f"{estimate.memory.total / GIB:.2f} GiB" in text
    assert f"{estimate.memory.activations / GIB:.2f} GiB" in text
    assert "free" in text
