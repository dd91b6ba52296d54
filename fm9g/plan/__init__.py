"""What training takes before it is begun: memory, disk and time (`fm9g plan`). Pure arithmetic: torch is not needed."""

from fm9g.plan.command import add_plan_arguments, run_plan
from fm9g.plan.estimate import Plan, plan, suggest
from fm9g.plan.memory import Moment, moments, peak
from fm9g.plan.setup import GPUS, Gpu, Setup
from fm9g.plan.show import alternatives, draw, table
from fm9g.plan.sizes import checkpoint_bytes, count_weights, flops_a_token

__all__ = [
    "GPUS",
    "Gpu",
    "Moment",
    "Plan",
    "Setup",
    "add_plan_arguments",
    "alternatives",
    "checkpoint_bytes",
    "count_weights",
    "draw",
    "flops_a_token",
    "moments",
    "peak",
    "plan",
    "run_plan",
    "suggest",
    "table",
]
