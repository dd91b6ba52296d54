"""What training takes before it is begun: memory, disk and time (`fm9g plan`). Pure arithmetic: torch is not needed."""

from fm9g.plan.command import add_plan_arguments, run_plan
from fm9g.plan.estimate import JobEstimate, estimate_job, suggest
from fm9g.plan.job import GPUS, Gpu, JobConfig
from fm9g.plan.memory import StepPhase, peak_memory, step_phases
from fm9g.plan.render import format_suggestions, format_table, plot_memory
from fm9g.plan.sizes import checkpoint_bytes, count_weights, flops_per_token

__all__ = [
    "GPUS",
    "Gpu",
    "JobConfig",
    "JobEstimate",
    "StepPhase",
    "add_plan_arguments",
    "checkpoint_bytes",
    "count_weights",
    "estimate_job",
    "flops_per_token",
    "format_suggestions",
    "format_table",
    "peak_memory",
    "plot_memory",
    "run_plan",
    "step_phases",
    "suggest",
]
