"""The optimizer of a run over the parts of weights that a process holds: fp32 copies, the rules, a mean of weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fm9g.engine.optimizers import OptimizerConfig, ParamOptimizer, ShardLayout, StepArgs, build_optimizers
from fm9g.errors import UserError

_BUCKET_SIZE = 1 << 27  # weights updated at a time, which takes 4 bytes for each beside them, at most twice


class ShardedOptimizer:
    """Keeps its state, and fp32 copies of weights that are not fp32 themselves, beside the weights or on the host.

    masters: name -> fp32 values that are updated in place of the weight's own. param_optimizers: name -> what changes
    it. ema: name -> fp32 running mean of the weight. step_count: (on the device) updates so far.
    """

    def __init__(
        self, weights: dict[str, torch.Tensor], config: OptimizerConfig, layout: ShardLayout, offload: bool
    ) -> None:
        """weights: the parts. Raises UserError where the optimizer cannot be used so."""
        self._config, self._offload = config, offload
        if offload and config.name != "adamw":
            raise UserError(f"offload_optimizer goes with optimizer adamw, not with {config.name}")
        self._device = next((weight.device for weight in weights.values()), torch.device("cpu"))
        pin = offload and self._device.type == "cuda"
        self._state_device = torch.device("cpu") if offload else self._device

        def zeros(shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._state_device, pin_memory=pin)

        self.param_optimizers = build_optimizers({name: layout.shape(name) for name in weights}, config, layout)
        for name, weight in weights.items():
            self.param_optimizers[name].init_state(
                name,
                lambda shard_shape=weight.shape, shape=None, dtype=torch.float32: zeros(
                    shard_shape if shape is None else shape, dtype
                ),
            )
        self.step_count = torch.zeros((), device=self._state_device)
        low_precision = {name: weight for name, weight in weights.items() if offload or weight.dtype != torch.float32}
        self.masters = {name: zeros(weight.shape).copy_(weight) for name, weight in low_precision.items()}
        self._host_grads = {name: zeros(weight.shape) for name, weight in weights.items()} if offload else {}
        averaged = weights if config.ema_decay else {}
        self.ema = {name: zeros(weight.shape).copy_(weight) for name, weight in averaged.items()}

    @property
    def supports_found_inf(self) -> bool:
        """Whether a step that must not count can be skipped without the host knowing."""
        return not self._offload and all(
            param_optimizer.supports_found_inf for param_optimizer in self.param_optimizers.values()
        )

    @torch.no_grad()
    def step(
        self,
        weights: dict[str, torch.Tensor],
        grads: dict[str, torch.Tensor],
        lr: float,
        factor: torch.Tensor,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Updates weights by grads * factor. found_inf: where `supports_found_inf`, 1.0 on the device for a step that
        changes nothing."""
        step_args = StepArgs(lr, self.step_count, found_inf)
        for bucket in self._buckets(weights):
            self._step(bucket, weights, grads, step_args, factor)
        self.step_count += 1.0 if found_inf is None else 1.0 - found_inf

    def _buckets(self, weights: dict[str, torch.Tensor]) -> Iterator[list[str]]:
        """Weights that follow one rule; those of no elements are those this process holds nothing of."""
        for param_optimizer in dict.fromkeys(self.param_optimizers.values()):
            bucket: list[str] = []
            size = 0
            for name, weight in weights.items():
                if self.param_optimizers[name] is param_optimizer and (
                    weight.numel() or param_optimizer.needs_full_tensor
                ):
                    bucket.append(name)
                    size += weight.numel()
                if size >= _BUCKET_SIZE:
                    yield bucket
                    bucket, size = [], 0
            if bucket:
                yield bucket

    def _step(
        self,
        names: list[str],
        weights: dict[str, torch.Tensor],
        grads: dict[str, torch.Tensor],
        step_args: StepArgs,
        factor: torch.Tensor,
    ) -> None:
        fp32_grads = [grads[name].float() for name in names]
        torch._foreach_mul_(fp32_grads, factor)
        if self._offload:
            for name, grad in zip(names, fp32_grads):
                self._host_grads[name].copy_(grad, non_blocking=True)
            fp32_grads = [self._host_grads[name] for name in names]
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        values = {name: self.masters.get(name, weights[name]) for name in names}
        self.param_optimizers[names[0]].step(values, dict(zip(names, fp32_grads)), step_args)
        if self.ema:
            ema_rate = torch.full((), 1 - self._config.ema_decay, device=self._state_device)
            ema_rate = ema_rate if step_args.found_inf is None else ema_rate * (1 - step_args.found_inf)
            for name, value in values.items():
                self.ema[name].lerp_(value, ema_rate)
        if changed := [name for name in names if name in self.masters]:
            # Narrowed on the device: on the host, that would be a copy in memory that is not pinned.
            new = [self.masters[name].to(self._device, non_blocking=True) for name in changed]
            torch._foreach_copy_([weights[name] for name in changed], new)


def saved_keys(param_optimizer: ParamOptimizer, name: str) -> list[str]:
    """What of a weight's state is kept in checkpoints; scales of 8-bit values are not, being made anew."""
    return [key for key in param_optimizer.state[name] if "." not in key]
