"""The optimizer of a run, over the shards that a process holds: update rules, fp32 masters, running means."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fm9g.engine.optimizers import OptimizerConfig, ParamOptimizer, ShardLayout, StepArgs, build_optimizers
from fm9g.errors import UserError


class ShardedOptimizer:
    """Its state, and the fp32 masters of low-precision weights, are on the weights' device or, offloaded, on the host.

        grad ── .float() * factor ─> (host) ─> param_optimizer ─> master ─┬─> (device) ─> weight
                                                                          └─> ema

    Attributes:
        masters: weight name to fp32 values that are updated in its place, and copied to it afterwards.
        param_optimizers: weight name to its update rule.
        ema: weight name to the fp32 running mean of its values.
        step_count: updates so far, on the device.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        config: OptimizerConfig,
        layout: ShardLayout,
        offload: bool,
        *,
        bucket_size: int = 1 << 27,
    ) -> None:
        """
        Args:
            weights: this process's parts of trained weights.
            offload: whether state and masters are on the host.
            bucket_size: elements updated at a time, which need 4 to 8 bytes each beside weights and state.

        Raises:
            UserError: if the optimizer does not work with `offload`.
        """
        self._config, self._offload, self._bucket_size = config, offload, bucket_size
        if offload and config.name not in ("adamw", "sgd"):
            raise UserError(f"offload_optimizer works with optimizer adamw and sgd, not with {config.name}")
        self._device = next((weight.device for weight in weights.values()), torch.device("cpu"))
        pin = offload and self._device.type == "cuda"
        self._state_device = torch.device("cpu") if offload else self._device

        def zeros(shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._state_device, pin_memory=pin)

        def zeros_like_shard(
            weight: torch.Tensor, shape: torch.Size | None = None, dtype: torch.dtype = torch.float32
        ) -> torch.Tensor:
            return zeros(weight.shape if shape is None else shape, dtype)

        self.param_optimizers = build_optimizers({name: layout.shape(name) for name in weights}, config, layout)
        for name, weight in weights.items():
            self.param_optimizers[name].init_state(name, functools.partial(zeros_like_shard, weight))
        self.step_count = torch.zeros((), device=self._state_device)
        low_precision = {name: weight for name, weight in weights.items() if offload or weight.dtype != torch.float32}
        self.masters = {name: zeros(weight.shape).copy_(weight) for name, weight in low_precision.items()}
        self._host_grads = {name: zeros(weight.shape) for name, weight in weights.items()} if offload else {}
        averaged = weights if config.ema_decay else {}
        self.ema = {name: zeros(weight.shape).copy_(weight) for name, weight in averaged.items()}

    @property
    def supports_found_inf(self) -> bool:
        """Whether the device alone can skip a step, without the host knowing."""
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
        """Updates weights by grads * factor.

        Args:
            factor: on the device, for clipping and loss scaling.
            found_inf: if `supports_found_inf`, on the device 1.0 for a step that must change nothing.
        """
        step_args = StepArgs(lr, self.step_count, found_inf)
        for bucket in self._buckets(weights):
            self._step(bucket, weights, grads, step_args, factor)
        self.step_count += 1.0 if found_inf is None else 1.0 - found_inf

    def _buckets(self, weights: dict[str, torch.Tensor]) -> Iterator[list[str]]:
        """Names of weights that share an update rule, up to bucket_size elements. Empty tensors mark absent shards."""
        for param_optimizer in dict.fromkeys(self.param_optimizers.values()):
            bucket: list[str] = []
            size = 0
            for name, weight in weights.items():
                if self.param_optimizers[name] is param_optimizer and (
                    weight.numel() or param_optimizer.needs_full_tensor
                ):
                    bucket.append(name)
                    size += weight.numel()
                if size >= self._bucket_size:
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
            # Rounded to the weight's dtype on the device: on the host, the copy would not be in pinned memory.
            updated = [self.masters[name].to(self._device, non_blocking=True) for name in changed]
            torch._foreach_copy_([weights[name] for name in changed], updated)


def saved_keys(param_optimizer: ParamOptimizer, name: str) -> list[str]:
    """The keys of a weight's state in checkpoints: all but the scales of 8-bit values, which loading computes."""
    return [key for key in param_optimizer.state[name] if "." not in key]
