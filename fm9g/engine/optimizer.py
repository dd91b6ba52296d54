"""AdamW over the parts of weights that a process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov, Hutter 2019). lr_scales: weight name -> factor on the learning rate of a step."""

    lr_scales: dict[str, float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float


_BUCKET = 1 << 27  # weights that are updated at a time: what this takes beside them is 4 bytes for each, at most twice


class Optimizer:
    """Keeps moments, and fp32 copies of weights that are not fp32 themselves, beside the weights or on the host.

    masters: name -> fp32 values that are updated in place of the weight's own. moments: name -> exp_avg, exp_avg_sq.
    steps: updates so far.
    """

    def __init__(self, weights: dict[str, torch.Tensor], settings: AdamW, offload: bool) -> None:
        self._settings, self._offload, self.steps = settings, offload, 0
        self._device = next((weight.device for weight in weights.values()), torch.device("cpu"))
        pin = offload and self._device.type == "cuda"
        self._home = torch.device("cpu") if offload else self._device

        def beside(weight: torch.Tensor) -> torch.Tensor:
            return torch.zeros(weight.shape, dtype=torch.float32, device=self._home, pin_memory=pin)

        self.moments = {n: {"exp_avg": beside(w), "exp_avg_sq": beside(w)} for n, w in weights.items()}
        narrow = {name: weight for name, weight in weights.items() if offload or weight.dtype != torch.float32}
        self.masters = {name: beside(weight).copy_(weight) for name, weight in narrow.items()}
        self._arrivals = {name: beside(weight) for name, weight in weights.items()} if offload else {}

    @torch.no_grad()
    def step(
        self, weights: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], lr: float, factor: torch.Tensor
    ) -> None:
        """Updates weights by grads * factor; weights of no elements are those this process holds nothing of."""
        self.steps += 1
        bucket: list[str] = []
        size = 0
        for name, weight in weights.items():
            if weight.numel():
                bucket.append(name)
                size += weight.numel()
            if size >= _BUCKET:
                self._step(bucket, weights, grads, lr, factor)
                bucket, size = [], 0
        if bucket:
            self._step(bucket, weights, grads, lr, factor)

    def _step(
        self,
        names: list[str],
        weights: dict[str, torch.Tensor],
        grads: dict[str, torch.Tensor],
        lr: float,
        factor: torch.Tensor,
    ) -> None:
        wide = [grads[name].float() for name in names]
        torch._foreach_mul_(wide, factor)
        if self._offload:
            for name, grad in zip(names, wide):
                self._arrivals[name].copy_(grad, non_blocking=True)
            wide = [self._arrivals[name] for name in names]
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        by_scale: dict[float, list[int]] = {}
        for i, name in enumerate(names):
            by_scale.setdefault(self._settings.lr_scales[name], []).append(i)
        for scale, members in by_scale.items():
            chosen = [names[i] for i in members]
            adamw(
                [self.masters.get(name, weights[name]) for name in chosen],
                [wide[i] for i in members],
                [self.moments[name]["exp_avg"] for name in chosen],
                [self.moments[name]["exp_avg_sq"] for name in chosen],
                [],
                # The function counts up what it is given, and wants a counter a weight.
                list(torch.full((len(chosen),), self.steps - 1.0, device=self._home).unbind()),
                fused=True,
                amsgrad=False,
                beta1=self._settings.betas[0],
                beta2=self._settings.betas[1],
                lr=lr * scale,
                weight_decay=self._settings.weight_decay,
                eps=self._settings.eps,
                maximize=False,
            )
        if changed := [name for name in names if name in self.masters]:
            # Narrowed on the device: on the host, that would be a copy in memory that is not pinned.
            new = [self.masters[name].to(self._device, non_blocking=True) for name in changed]
            torch._foreach_copy_([weights[name] for name in changed], new)
