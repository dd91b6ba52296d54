"""The optimizer of a run over the parts of weights that a process holds: fp32 copies, the rules, a mean of weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fm9g.engine.rules import Layout, OptimizerSettings, Rule, Update, rules_for
from fm9g.errors import UserError

_BUCKET = 1 << 27  # weights that are updated at a time: what this takes beside them is 4 bytes for each, at most twice


class Optimizer:
    """Keeps its state, and fp32 copies of weights that are not fp32 themselves, beside the weights or on the host.

    masters: name -> fp32 values that are updated in place of the weight's own. rules: name -> what changes it. means:
    name -> fp32 running mean of the weight. steps: (on the device) updates so far.
    """

    def __init__(
        self, weights: dict[str, torch.Tensor], settings: OptimizerSettings, layout: Layout, offload: bool
    ) -> None:
        """weights: the parts. Raises UserError where the optimizer cannot be used so."""
        self._settings, self._offload = settings, offload
        if offload and settings.name != "adamw":
            raise UserError(f"optimizer_offload goes with optimizer adamw, not with {settings.name}")
        self._device = next((weight.device for weight in weights.values()), torch.device("cpu"))
        pin = offload and self._device.type == "cuda"
        self._home = torch.device("cpu") if offload else self._device

        def zeros(shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._home, pin_memory=pin)

        self.rules = rules_for({name: layout.shape(name) for name in weights}, settings, layout)
        for name, weight in weights.items():
            self.rules[name].add(
                name,
                lambda own=weight.shape, shape=None, dtype=torch.float32: zeros(own if shape is None else shape, dtype),
            )
        self.steps = torch.zeros((), device=self._home)
        narrow = {name: weight for name, weight in weights.items() if offload or weight.dtype != torch.float32}
        self.masters = {name: zeros(weight.shape).copy_(weight) for name, weight in narrow.items()}
        self._arrivals = {name: zeros(weight.shape) for name, weight in weights.items()} if offload else {}
        averaged = weights if settings.ema_decay else {}
        self.means = {name: zeros(weight.shape).copy_(weight) for name, weight in averaged.items()}

    @property
    def skips(self) -> bool:
        """Whether a step that must not count can be skipped without the host knowing."""
        return not self._offload and all(rule.skips for rule in self.rules.values())

    @torch.no_grad()
    def step(
        self,
        weights: dict[str, torch.Tensor],
        grads: dict[str, torch.Tensor],
        lr: float,
        factor: torch.Tensor,
        skip: torch.Tensor | None = None,
    ) -> None:
        """Updates weights by grads * factor. skip: where `skips`, 1.0 on the device for a step that changes nothing."""
        update = Update(lr, self.steps, skip)
        for bucket in self._buckets(weights):
            self._step(bucket, weights, grads, update, factor)
        self.steps += 1.0 if skip is None else 1.0 - skip

    def _buckets(self, weights: dict[str, torch.Tensor]) -> Iterator[list[str]]:
        """Weights that follow one rule; those of no elements are those this process holds nothing of."""
        for rule in dict.fromkeys(self.rules.values()):
            bucket: list[str] = []
            size = 0
            for name, weight in weights.items():
                if self.rules[name] is rule and (weight.numel() or rule.gathers):
                    bucket.append(name)
                    size += weight.numel()
                if size >= _BUCKET:
                    yield bucket
                    bucket, size = [], 0
            if bucket:
                yield bucket

    def _step(
        self,
        names: list[str],
        weights: dict[str, torch.Tensor],
        grads: dict[str, torch.Tensor],
        update: Update,
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
        values = {name: self.masters.get(name, weights[name]) for name in names}
        self.rules[names[0]].update(values, dict(zip(names, wide)), update)
        if self.means:
            pace = torch.full((), 1 - self._settings.ema_decay, device=self._home)
            pace = pace if update.skip is None else pace * (1 - update.skip)
            for name, value in values.items():
                self.means[name].lerp_(value, pace)
        if changed := [name for name in names if name in self.masters]:
            # Narrowed on the device: on the host, that would be a copy in memory that is not pinned.
            new = [self.masters[name].to(self._device, non_blocking=True) for name in changed]
            torch._foreach_copy_([weights[name] for name in changed], new)


def saved_keys(rule: Rule, name: str) -> list[str]:
    """What of a weight's state is kept in checkpoints; scales of 8-bit values are not, being made anew."""
    return [key for key in rule.state[name] if "." not in key]
