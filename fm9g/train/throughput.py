"""Rate, MFU, and where the time goes: arithmetic on the timings of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fm9g.config.model import ModelConfig
from fm9g.model.counts import training_flops
from fm9g.train.timer import PHASES, StepTimings


@dataclass(frozen=True)
class FlopsModel:
    """What model FLOPs utilization (MFU) is computed from.

    Args:
        model: shapes of the model.
        adapter_params: parameters of its adapters.
        peak_flops: floating-point operations per second of one device; None or 0: unknown, so there is no MFU.
    """

    model: ModelConfig
    adapter_params: int = 0
    peak_flops: float | None = None

    def mfu(self, tokens: float, sum_sq_seqlens: float, seconds: float, num_devices: int) -> float | None:
        """The share of the devices' peak that training on these tokens used."""
        if not self.peak_flops:
            return None
        flops = training_flops(self.model, tokens, sum_sq_seqlens, self.adapter_params)
        return flops / seconds / (self.peak_flops * num_devices)


def throughput_metrics(timings: Sequence[StepTimings], ranks_per_replica: int, flops: FlopsModel) -> dict[str, float]:
    """Throughput/tokens_per_second, Throughput/mfu (share, if the peak is known) and Time/PHASE (seconds per step).

    Args:
        timings: of each rank, over the same steps.
        ranks_per_replica: ranks that train on the same tokens, and so count them more than once.
        flops: for the MFU.
    """
    tokens = sum(rank.tokens for rank in timings) / ranks_per_replica
    sum_sq_seqlens = sum(rank.sum_sq_seqlens for rank in timings) / ranks_per_replica
    seconds, steps = max(rank.seconds for rank in timings), max(1, timings[0].steps)
    metrics = {"Throughput/tokens_per_second": tokens / seconds}
    if (mfu := flops.mfu(tokens, sum_sq_seqlens, seconds, len(timings))) is not None:
        metrics["Throughput/mfu"] = mfu
    phases = {name: sum(rank.phases[name] for rank in timings) / len(timings) for name in PHASES}
    metrics["Time/compute"] = max(0.0, seconds - sum(phases.values())) / steps
    return metrics | {f"Time/{name}": value / steps for name, value in phases.items()}
