"""Weights and optimizer state by name: full tensors on rank 0 from the shards of all ranks, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from fm9g.engine.collectives import Collectives
from fm9g.engine.dist_context import DistContext
from fm9g.engine.gather import GatheredStateDict, GatherSpec
from fm9g.engine.gradients import DynamicLossScaler
from fm9g.engine.sharded_optimizer import ShardedOptimizer, saved_keys
from fm9g.engine.shards import ShardInfo
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import tensor_meta

SCALARS = "numbers"  # key of the state of no weight: steps so far, loss scale, good steps


class ShardedState:
    """Exports and restores the state of a training, for any number of processes. See `Engine` for its methods."""

    def __init__(
        self,
        shards: dict[str, ShardInfo],
        optimizer: ShardedOptimizer,
        loss_scaler: DynamicLossScaler,
        collectives: Collectives,
        dist_context: DistContext,
    ) -> None:
        self._shards, self._optimizer, self._loss_scaler = shards, optimizer, loss_scaler
        self._collectives, self._dist_context = collectives, dist_context

    def weights(self, trainable_only: bool) -> GatheredStateDict:
        masters = self._optimizer.masters
        shards = self._selected(trainable_only)
        return self._gathered({name: shard.gather_spec(masters.get(name)) for name, shard in shards.items()})

    def ema_weights(self, trainable_only: bool) -> GatheredStateDict:
        ema, masters = self._optimizer.ema, self._optimizer.masters
        shards = self._selected(trainable_only) if ema else {}
        specs = {name: shard.gather_spec(ema.get(name, masters.get(name))) for name, shard in shards.items()}
        return self._gathered(specs)

    def _selected(self, trainable_only: bool) -> dict[str, ShardInfo]:
        return {name: shard for name, shard in self._shards.items() if shard.trainable or not trainable_only}

    def optimizer_state(self) -> GatheredStateDict:
        is_rank_zero = self._dist_context.rank == 0
        specs = {SCALARS: GatherSpec(torch.Size([3]), _full_view, is_rank_zero, self._scalars)}
        for name, key in self._state_keys():
            shard, param_optimizer = self._shards[name], self._optimizer.param_optimizers[name]
            tensor = functools.partial(param_optimizer.export_state, name, key)
            replicated_shape = param_optimizer.replicated_shape(name, key)
            specs[f"{name}.{key}"] = (
                GatherSpec(shard.shape, shard.local_view, shard.is_primary, tensor)
                if replicated_shape is None
                else GatherSpec(replicated_shape, _full_view, is_rank_zero, tensor)
            )
        return self._gathered(specs)

    def load_optimizer_state(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        if self._dist_context.rank == 0:
            self._check_matches(state_dict)
        scalars = self._collectives.broadcast_from_rank0(torch.Size([3]), state_dict.get(SCALARS))
        self._optimizer.step_count.copy_(scalars[0])
        _, scale, good_steps = scalars.tolist()
        self._loss_scaler.good_steps = int(good_steps)
        if self._loss_scaler.growth_interval:
            self._loss_scaler.scale = scale
        for name, key in self._state_keys():
            shard, param_optimizer = self._shards[name], self._optimizer.param_optimizers[name]
            replicated_shape = param_optimizer.replicated_shape(name, key)
            shape = shard.shape if replicated_shape is None else replicated_shape
            full = self._collectives.broadcast_from_rank0(shape, state_dict.get(f"{name}.{key}"))
            param_optimizer.load_state(name, key, shard.local_view(full) if replicated_shape is None else full)

    def _check_matches(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        expected = self.optimizer_state().meta
        if mismatched := sorted(state_dict.keys() ^ expected.keys()):
            raise UserError(
                f"the optimizer state belongs to another optimizer or to other weights: {', '.join(mismatched[:5])}. "
                "--resume_no_optimze true resumes without it; with pretrained_model, --only_load_model true does"
            )
        saved = tensor_meta(state_dict)  # which reads no tensor of a file
        if mismatched := [name for name, meta in expected.items() if saved[name].shape != meta.shape]:
            raise UserError(f"the optimizer state of {mismatched[0]} has another shape than the model's weight")

    def load_ema_weights(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        for name, mean in self._optimizer.ema.items():
            shard = self._shards[name]
            mean.copy_(shard.local_view(self._collectives.broadcast_from_rank0(shard.shape, state_dict.get(name))))

    def _scalars(self) -> torch.Tensor:
        scaler = self._loss_scaler
        return torch.tensor([float(self._optimizer.step_count), scaler.scale, scaler.good_steps])

    def _state_keys(self) -> list[tuple[str, str]]:
        """(weight name, key) of each tensor of the optimizer's state that checkpoints contain."""
        return [
            (name, key)
            for name, param_optimizer in self._optimizer.param_optimizers.items()
            for key in saved_keys(param_optimizer, name)
        ]

    def _gathered(self, specs: dict[str, GatherSpec]) -> GatheredStateDict:
        context = self._dist_context
        return GatheredStateDict(specs, context.device, context.world_size, context.background_group)


def _full_view(full: torch.Tensor) -> torch.Tensor:
    return full
