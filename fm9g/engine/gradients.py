"""The gradients of a step: their norm over all processes, clipping, and the loss scaling of fp16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def grad_norm(
    grads: dict[str, torch.Tensor],
    num_replicas: dict[str, int],
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """The L2 norm of all gradients over all processes, on the device.

    Args:
        grads: name to this process's part of a gradient.
        num_replicas: name to the number of processes that hold the same part; each part counts once.
        all_reduce_sum: replaces a tensor by its sum over all processes.
    """
    total = torch.zeros((), device=device)
    by_num_replicas: dict[int, list[torch.Tensor]] = {}
    for name, grad in grads.items():
        if grad.numel():
            by_num_replicas.setdefault(num_replicas[name], []).append(grad)
    for replicas, replicated in by_num_replicas.items():
        norms = torch._foreach_norm(replicated, 2, dtype=torch.float32)
        total = total + torch.stack(norms).square().sum() / replicas
    return all_reduce_sum(total).sqrt()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """The factor on all gradients that clips a norm to max_norm (0: no clipping), as torch's clip_grad_norm_ has it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)


@dataclass
class DynamicLossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018), by default none.

    Args:
        scale: factor on the loss. It is halved when a gradient overflows, and doubled after growth_interval steps
            without overflow.
        growth_interval: in steps; 0: the scale never changes.
        good_steps: steps without overflow since the scale changed.
    """

    scale: float = 1.0
    growth_interval: int = 0
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Adapts the scale after a step. finite: whether its gradients were."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
