"""The interface between training and an engine.

An engine takes a plain model from the meta device, decides which process holds which part of its weights, and does
everything that involves the weights of other processes. It knows nothing of data, files or schedules.

    one step:   forward ─> backward (once per micro-batch) ─> step: norm ─> clip ─> optimizer ─> zero_grad
    ideas:      gradients.py         norm, clipping, loss scaling
                sharded_optimizer.py fp32 masters, running means; optimizers.py: the update rules
                sharded_state.py     weights and optimizer state to and from full tensors; gather.py: one at a time
                collectives.py       the messages; shards.py: the part of a weight that a process holds
    engines:    fsdp.py, bmtrain.py
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fm9g.engine.activation_checkpoint import apply_activation_checkpointing
from fm9g.engine.collectives import Collectives
from fm9g.engine.comm_timer import CommTimer
from fm9g.engine.dist_context import DistContext
from fm9g.engine.gather import GatheredStateDict
from fm9g.engine.gradients import DynamicLossScaler, clip_factor, grad_norm
from fm9g.engine.optimizers import OptimizerConfig, ShardLayout
from fm9g.engine.sharded_optimizer import ShardedOptimizer
from fm9g.engine.sharded_state import ShardedState
from fm9g.engine.shards import ShardInfo
from fm9g.engine.tensor_stats import TensorStats, compute_tensor_stats
from fm9g.out_of_memory import oom_as_user_error

WeightInit = Callable[[str, torch.Tensor], None]


@runtime_checkable
class HoldsQuantizedWeight(Protocol):
    """A module whose weight is not a parameter. The engine sets it once, on every process, from full fp32 values."""

    weight_shape: torch.Size

    def set_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> None: ...


@dataclass(frozen=True)
class ParallelConfig:
    """How an engine distributes a model.

    Args:
        dtype: of the computation. Every trained weight also has an fp32 copy.
        zero_level: 3: the weights of a layer are gathered for its forward pass and again for its backward pass;
            2: they stay gathered in between; 0: every process holds all weights.
        checkpointing: activation checkpointing, none, selective or full.
        checkpointed_layers: how many layers, from the first on, it applies to.
        tp_size: processes that share the computation of each layer.
        sequence_parallel: whether these also share that of the norms.
        offload: whether the optimizer works on the host.
        frozen_in_compute_dtype: whether weights that are not trained have no fp32 copy.
    """

    dtype: torch.dtype = torch.float32
    zero_level: int = 3
    checkpointing: str = "none"
    checkpointed_layers: int = 0
    tp_size: int = 1
    sequence_parallel: bool = True
    offload: bool = False
    frozen_in_compute_dtype: bool = False


class Engine(ABC):
    """One process's part of a training. All processes must call its methods in the same order.

    Attributes:
        model: after `prepare`, the distributed model.
        dp_rank, dp_size: this process among those that train on different data. Processes that share the layers of
            one replica of the model have the same dp_rank.
        loss_scaler: that of fp16; see DynamicLossScaler.
        comm_timer: the time of this process's messages, as far as the engine sees them.
    """

    model: torch.nn.Module

    def __init__(self, dist_context: DistContext, seed: int, collectives: Collectives) -> None:
        """seed: of dropout."""
        self.dist_context, self.device, self._seed = dist_context, dist_context.device, seed
        self.dp_rank, self.dp_size = dist_context.rank, dist_context.world_size
        self.comm_timer = CommTimer(self.device)
        self._collectives = collectives
        self._shards: dict[str, ShardInfo] = {}

    @property
    def ranks_per_replica(self) -> int:
        """Processes that train on the same data."""
        return self.dist_context.world_size // self.dp_size

    def prepare(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        init_weight: WeightInit,
        optimizer_config: OptimizerConfig,
        parallel_config: ParallelConfig,
        loss_scaler: DynamicLossScaler,
        export_name: Callable[[str], str] = str,
    ) -> None:
        """Distributes a model that was built on the meta device, and creates its optimizer.

        Args:
            layers: modules of the model that are gathered and checkpointed one at a time.
            init_weight: writes the values of the named weight into a tensor. It is called on rank 0 alone, for one
                weight at a time, so that no process ever holds the full model.
            export_name: maps the name of a parameter to its name in files, which all other arguments and methods use.

        Raises:
            UserError: if the model does not fit in memory or cannot be distributed as configured.
        """
        self.loss_scaler, self._parallel_config, self._export_name = loss_scaler, parallel_config, export_name
        for layer in list(layers)[: parallel_config.checkpointed_layers]:
            apply_activation_checkpointing(layer, parallel_config.checkpointing)
        advice = f"the model does not fit in the memory of {self.device}; `fm9g plan` shows how much it needs"
        with oom_as_user_error(advice):
            self._set_quantized_weights(model, init_weight)
            self.model = self._shard_model(model.train(), layers, init_weight, parallel_config)
            self._shards = self._local_shards()
            self._optimizer = self._create_optimizer(optimizer_config, parallel_config.offload)
            self._restore_precision(init_weight)
        self._state = ShardedState(
            self._shards, self._optimizer, self.loss_scaler, self._collectives, self.dist_context
        )

    def _set_quantized_weights(self, model: torch.nn.Module, init_weight: WeightInit) -> None:
        for path, module in model.named_modules():
            if isinstance(module, HoldsQuantizedWeight):
                content = functools.partial(init_weight, self._export_name(f"{path}.weight"))
                full = self._collectives.broadcast_from_rank0(module.weight_shape, content)
                module.set_weight(full, self._parallel_config.dtype)

    def _create_optimizer(self, optimizer_config: OptimizerConfig, offload: bool) -> ShardedOptimizer:
        shards = self._shards
        layout = ShardLayout(
            shape=lambda name: shards[name].shape,
            all_gather_full=lambda name, local: self._collectives.all_gather_full(shards[name], local),
            local_view=lambda name, full: shards[name].local_view(full),
        )
        trainable = {name: shard.tensor() for name, shard in shards.items() if shard.trainable}
        return ShardedOptimizer(trainable, optimizer_config, layout, offload)

    def _restore_precision(self, init_weight: WeightInit) -> None:
        """Initializes the fp32 masters of low-precision weights again: copies of the weights would have lost bits."""
        for name, master in self._optimizer.masters.items():
            shard = self._shards[name]
            if shard.tensor().dtype == torch.float32:
                continue
            full = self._collectives.broadcast_from_rank0(shard.shape, functools.partial(init_weight, name))
            master.copy_(shard.local_view(full))
            if name in self._optimizer.ema:
                self._optimizer.ema[name].copy_(master)

    def _named_params(self, model: torch.nn.Module) -> list[tuple[str, Any]]:
        """The parameters of a model by their names in files."""
        return [(self._export_name(name), weight) for name, weight in model.named_parameters()]

    @abstractmethod
    def _shard_model(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        init_weight: WeightInit,
        parallel_config: ParallelConfig,
    ) -> torch.nn.Module:
        """The distributed model with initialized weights."""

    @abstractmethod
    def _local_shards(self) -> dict[str, ShardInfo]:
        """This process's parts of all weights by name, in the same order on every process."""

    def forward(self, batch: Any, dropout_seed: int) -> Any:
        """The model's result for a batch, to be passed to backward.

        Args:
            dropout_seed: a number that is unique to this batch in the run.
        """
        torch.manual_seed((self._seed << 31) + dropout_seed)
        return self.model(batch)

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        """Adds the gradients of a loss, which must already be divided by the targets of the step.

        Args:
            is_last_micro_batch: whether no other batch follows in this step.
        """
        (loss * self.loss_scaler.scale).backward()

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Any:
        """The model's result for a batch, without dropout and without memory for a backward pass."""
        self.model.eval()
        try:
            return self.model(batch)
        finally:
            self.model.train()

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        """Clips the summed gradients to max_norm (0: no clipping), updates the weights, clears the gradients.

        If the norm is not finite, weights and optimizer stay as they are; with loss scaling the scale is halved. With
        AdamW the device decides that alone, and the host does not wait for it.

        Returns:
            The norm before clipping, over all processes, on the device.
        """
        grads, scaler = self._grads(), self.loss_scaler
        norm = self._grad_norm(grads) / scaler.scale
        factor = clip_factor(norm, max_norm) * (torch.ones_like(norm) / scaler.scale)
        check_on_host = bool(scaler.growth_interval) or not self._optimizer.supports_found_inf
        finite = bool(norm.isfinite()) if check_on_host else True
        if finite:
            weights = {name: self._shards[name].tensor() for name in grads}
            found_inf = None if check_on_host else 1.0 - norm.isfinite().float()
            self._optimizer.step(weights, grads, lr, factor, found_inf)
        if scaler.growth_interval:
            scaler.update(finite)
        self.zero_grad()
        return norm

    def _grads(self) -> dict[str, torch.Tensor]:
        """The gradients of trained weights, in the same order on every process."""
        grads = {}
        for name, shard in self._shards.items():
            grad = shard.grad() if shard.trainable else None
            if grad is None and shard.trainable and not shard.tensor().numel():
                grad = shard.tensor()  # this process has no part of it, but must join the messages of the others
            if grad is not None:
                grads[name] = grad
        return grads

    def _grad_norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        num_replicas = {name: shard.num_replicas for name, shard in self._shards.items()}
        return grad_norm(grads, num_replicas, self._timed_all_reduce_sum, self.device)

    def _timed_all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        with self.comm_timer:
            return self._collectives.all_reduce_sum(values)

    def zero_grad(self) -> None:
        """Clears the summed gradients."""
        self.model.zero_grad(set_to_none=True)

    def tensor_stats(self) -> dict[str, tuple[TensorStats, TensorStats]]:
        """Statistics of each trained weight and of its gradient in the step so far, by name. Waits for the device."""
        grads = self._grads()
        num_replicas = [self._shards[name].num_replicas for name in grads]
        weights = [functools.partial(self._fp32_master, name) for name in grads]
        unscaled = [functools.partial(torch.div, grad, self.loss_scaler.scale) for grad in grads.values()]
        tensors = list(zip([*weights, *unscaled], num_replicas * 2))
        all_gather_object = self.dist_context.all_gather_object
        stats = compute_tensor_stats(tensors, self._collectives.all_reduce_sum, all_gather_object, self.device)
        return dict(zip(grads, zip(stats[: len(grads)], stats[len(grads) :])))

    def _fp32_master(self, name: str) -> torch.Tensor:
        """This process's part of a weight on the device, in fp32 if there is an fp32 copy."""
        master = self._optimizer.masters.get(name)
        return self._shards[name].tensor() if master is None else master.to(self.device)

    def dp_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all replicas of the model."""
        return self._collectives.all_reduce_sum(values.clone()) / self.ranks_per_replica

    def weights(self, trainable_only: bool = False) -> GatheredStateDict:
        """All weights by name in files, fp32, complete on the host of rank 0.

        Args:
            trainable_only: leave out weights that are not trained.
        """
        return self._state.weights(trainable_only)

    def ema_weights(self, trainable_only: bool = False) -> GatheredStateDict:
        """As `weights`, with running means in place of trained weights; empty without ema_decay."""
        return self._state.ema_weights(trainable_only)

    def optimizer_state(self) -> GatheredStateDict:
        """The optimizer's state, fp32, complete on the host of rank 0.

        Its keys are NAME.exp_avg, NAME.exp_avg_sq or others of the optimizer, with NAME of a weight; and "numbers": the
        steps so far, the loss scale, and the steps since it changed.
        """
        return self._state.optimizer_state()

    def load_optimizer_state(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Restores the result of `optimizer_state`, from any engine and number of processes.

        Args:
            state_dict: on rank 0; on other processes it may be empty.

        Raises:
            UserError: if names or shapes do not match.
        """
        self._state.load_optimizer_state(state_dict)

    def load_ema_weights(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Restores the result of `ema_weights`. state_dict: as for load_optimizer_state."""
        self._state.load_ema_weights(state_dict)
