"""What a trainer needs from a sharding engine, and what all engines have in common.

An engine takes a plain model from the meta device, decides where its weights live, and does with them what involves
other processes. It knows nothing of data, files or schedules.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fm9g.engine.activation_checkpoint import apply_activation_checkpointing
from fm9g.engine.comm_timer import CommTimer
from fm9g.engine.dist_context import DistContext
from fm9g.engine.gather import GatheredStateDict, GatherSpec
from fm9g.engine.optimizers import OptimizerConfig, ShardLayout
from fm9g.engine.sharded_optimizer import ShardedOptimizer, saved_keys
from fm9g.engine.tensor_stats import TensorStats, compute_tensor_stats
from fm9g.errors import UserError
from fm9g.memory import is_out_of_memory

WeightInit = Callable[[str, torch.Tensor], None]


@runtime_checkable
class HoldsQuantizedWeight(Protocol):
    """A module whose weight is no parameter: every process hands it the whole values, fp32, once."""

    weight_shape: torch.Size

    def set_weight(self, weight: torch.Tensor, dtype: torch.dtype) -> None: ...


@dataclass(frozen=True)
class ParallelConfig:
    """How an engine places a model.

    dtype: of the computation; every weight has an fp32 copy. frozen_in_compute_dtype: weights that are not trained have
    none. zero_level: 3, weights are gathered layer by layer, again in the backward pass; 2, they stay gathered in
    between; 0, every process holds all. checkpointing: none, selective or full, for as many of the first layers.
    tp_size: processes that share the work of each layer; sequence_parallel: and that of the norms. offload: the
    optimizer works in the host's memory.
    """

    dtype: torch.dtype = torch.float32
    zero_level: int = 3
    checkpointing: str = "none"
    checkpointed_layers: int = 0
    tp_size: int = 1
    sequence_parallel: bool = True
    offload: bool = False
    frozen_in_compute_dtype: bool = False


@dataclass(frozen=True)
class ShardInfo:
    """What this process holds of a weight.

    shape: of the whole weight. local_view: the view of a whole tensor that is this part. num_replicas: processes that
    hold the same part; is_primary: this is the one of them that speaks for it. tensor, grad: the part itself and its
    gradient.
    """

    shape: torch.Size
    local_view: Callable[[torch.Tensor], torch.Tensor]
    num_replicas: int
    is_primary: bool
    trainable: bool
    tensor: Callable[[], torch.Tensor]
    grad: Callable[[], torch.Tensor | None]

    def gather_spec(self, local: torch.Tensor | None = None) -> GatherSpec:
        """The part as it is to be collected. local: in place of its own tensor."""
        return GatherSpec(self.shape, self.local_view, self.is_primary, self.tensor if local is None else lambda: local)


@dataclass
class DynamicLossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018): halved when a gradient overflows, doubled after
    `growth_interval` without.

    scale: 1 and growth_interval: 0 where there is none.
    """

    scale: float = 1.0
    growth_interval: int = 0
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0


class Engine(ABC):
    """One process's part of a training run.

    dp_rank, dp_size: its place among the processes that train on different data.
    """

    def __init__(self, dist_context: DistContext, seed: int) -> None:
        """seed: of dropout."""
        self.dist_context, self.device, self._seed = dist_context, dist_context.device, seed
        self.dp_rank, self.dp_size = dist_context.rank, dist_context.world_size
        self._shards: dict[str, ShardInfo] = {}
        self.comm_timer = CommTimer(self.device)  # of this process's messages to others, as far as they are seen

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
        """Places a model that was built on the meta device and makes its optimizer.

        layers: the modules that are gathered and checkpointed one at a time. init_weight: writes the values of the
        weight of that name into a tensor; it is asked on rank 0 alone, for one weight at a time. Weights that require
        no gradient stay as they are. export_name: makes the name by which a weight is known outside of that in the
        model. Raises UserError where the model does not fit in memory or cannot be placed so.
        """
        self.loss_scaler, self._parallel_config, self._export_name = loss_scaler, parallel_config, export_name
        for layer in list(layers)[: parallel_config.checkpointed_layers]:
            apply_activation_checkpointing(layer, parallel_config.checkpointing)
        try:
            for path, module in model.named_modules():
                if isinstance(module, HoldsQuantizedWeight):
                    full = self._broadcast_from_rank0(
                        module.weight_shape, functools.partial(init_weight, export_name(f"{path}.weight"))
                    )
                    module.set_weight(full, parallel_config.dtype)
            self._model = self._shard_model(model.train(), layers, init_weight, parallel_config)
            self._shards = self._local_shards()
            trainable = {name: shard.tensor() for name, shard in self._shards.items() if shard.trainable}
            layout = ShardLayout(lambda name: self._shards[name].shape, self._all_gather_full, self._local_view)
            self._optimizer = ShardedOptimizer(trainable, optimizer_config, layout, parallel_config.offload)
            for name, master in self._optimizer.masters.items():
                shard = self._shards[name]
                if trainable[name].dtype != torch.float32:  # what was lost by narrowing is asked for again
                    master.copy_(
                        shard.local_view(self._broadcast_from_rank0(shard.shape, functools.partial(init_weight, name)))
                    )
                    if name in self._optimizer.ema:
                        self._optimizer.ema[name].copy_(master)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the model does not fit in the memory of {self.device} ({error}); `fm9g plan` tells what it takes"
            ) from None

    def _named_params(self, model: torch.nn.Module) -> list[tuple[str, Any]]:
        """The parameters of a model with the names by which they are known outside."""
        return [(self._export_name(name), weight) for name, weight in model.named_parameters()]

    @abstractmethod
    def _shard_model(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        init_weight: WeightInit,
        parallel_config: ParallelConfig,
    ) -> torch.nn.Module:
        """The model with its weights where they belong, filled."""

    @abstractmethod
    def _local_shards(self) -> dict[str, ShardInfo]:
        """The parts of all weights by full name, in the same order on every rank."""

    def forward(self, batch: Any, dropout_seed: int) -> Any:
        """The model's result for a batch, to be handed to backward. dropout_seed: of dropout's generator, a number that
        is this batch's alone in the run."""
        torch.manual_seed((self._seed << 31) + dropout_seed)
        return self._model(batch)

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        """Adds the gradients of a loss, which is already divided by what the whole step is divided by.

        is_last_micro_batch: no other batch follows in this step.
        """
        (loss * self.loss_scaler.scale).backward()

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Any:
        """The model's result for a batch, without dropout and without what a backward pass needs."""
        self._model.eval()
        try:
            return self._model(batch)
        finally:
            self._model.train()

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        """Clips the summed gradients to max_norm (0: not), updates the weights, clears the gradients.

        Returns the norm before clipping, over all ranks, still on the device. A norm that is not finite changes
        nothing, neither weights nor the optimizer's state; with loss scaling it changes the scale. With AdamW the
        device alone knows: the host does not wait for it.
        """
        grads = self._grads()
        norm = self._grad_norm(grads) / self.loss_scaler.scale
        factor = torch.ones_like(norm) / self.loss_scaler.scale
        if max_norm:
            factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        check_on_host = bool(self.loss_scaler.growth_interval) or not self._optimizer.supports_found_inf
        finite = bool(norm.isfinite()) if check_on_host else True
        if finite:
            weights = {name: self._shards[name].tensor() for name in grads}
            found_inf = None if check_on_host else 1.0 - norm.isfinite().float()
            self._optimizer.step(weights, grads, lr, factor, found_inf)
        if self.loss_scaler.growth_interval:
            self.loss_scaler.update(finite)
        self.zero_grad()
        return norm

    def _grads(self) -> dict[str, torch.Tensor]:
        """The gradients of trained weights, in the same order on every rank."""
        grads = {}
        for name, shard in self._shards.items():
            grad = shard.grad() if shard.trainable else None
            if grad is None and shard.trainable and not shard.tensor().numel():
                grad = shard.tensor()  # nothing of it is here, but others may wait for this process
            if grad is not None:
                grads[name] = grad
        return grads

    def zero_grad(self) -> None:
        """Forgets the gradients that were added up."""
        self._model.zero_grad(set_to_none=True)

    def _grad_norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """The norm of all gradients: each part counts once, however many processes hold it."""
        total = torch.zeros((), device=self.device)
        by_num_replicas: dict[int, list[torch.Tensor]] = {}
        for name, grad in grads.items():
            if grad.numel():
                by_num_replicas.setdefault(self._shards[name].num_replicas, []).append(grad)
        for num_replicas, replicated in by_num_replicas.items():
            norms = torch._foreach_norm(replicated, 2, dtype=torch.float32)
            total = total + torch.stack(norms).square().sum() / num_replicas
        with self.comm_timer:
            return self._all_reduce_sum(total).sqrt()

    def tensor_stats(self) -> dict[str, tuple[TensorStats, TensorStats]]:
        """What the trained weights and the gradients of the step so far are like, by name. It waits for the device."""
        grads = self._grads()
        num_replicas = [self._shards[name].num_replicas for name in grads]
        weights = [functools.partial(self._fp32_master, name) for name in grads]
        unscaled = [functools.partial(torch.div, grad, self.loss_scaler.scale) for grad in grads.values()]
        tensors = list(zip([*weights, *unscaled], num_replicas * 2))
        stats = compute_tensor_stats(tensors, self._all_reduce_sum, self.dist_context.all_gather_object, self.device)
        return dict(zip(grads, zip(stats[: len(grads)], stats[len(grads) :])))

    def _fp32_master(self, name: str) -> torch.Tensor:
        """This process's part of a weight on the device, fp32 where it is kept so."""
        master = self._optimizer.masters.get(name)
        return self._shards[name].tensor() if master is None else master.to(self.device)

    def dp_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all replicas."""
        return self._all_reduce_sum(values.clone()) * self.dp_size / self.dist_context.world_size

    @abstractmethod
    def _all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor, which becomes the elementwise sum over all processes."""

    def weights(self, trainable_only: bool = False) -> GatheredStateDict:
        """Every weight by its full name, fp32, whole on rank 0's host. trainable_only: those that are trained alone."""
        masters = self._optimizer.masters
        shards = {name: shard for name, shard in self._shards.items() if shard.trainable or not trainable_only}
        return self._gathered({name: shard.gather_spec(masters.get(name)) for name, shard in shards.items()})

    def ema_weights(self, trainable_only: bool = False) -> GatheredStateDict:
        """As `weights`, the running means in place of weights that are trained; nothing where none are kept."""
        ema, masters = self._optimizer.ema, self._optimizer.masters
        shards = {
            name: shard for name, shard in self._shards.items() if ema and (shard.trainable or not trainable_only)
        }
        specs = {name: shard.gather_spec(ema.get(name, masters.get(name))) for name, shard in shards.items()}
        return self._gathered(specs)

    def optimizer_state(self) -> GatheredStateDict:
        """The optimizer's state by full weight name, fp32, as `weights` gives weights: NAME.exp_avg, NAME.exp_avg_sq,
        or what else the optimizer keeps; and under "numbers" the steps made, the loss scale and good steps since."""
        is_rank_zero = self.dist_context.rank == 0
        specs = {"numbers": GatherSpec(torch.Size([3]), _identity, is_rank_zero, self._scalars)}
        for name, key in self._state_keys():
            shard, param_optimizer = self._shards[name], self._optimizer.param_optimizers[name]
            tensor = functools.partial(param_optimizer.export_state, name, key)
            replicated_shape = param_optimizer.replicated_shape(name, key)
            full = (
                GatherSpec(replicated_shape, _identity, is_rank_zero, tensor) if replicated_shape is not None else None
            )
            specs[f"{name}.{key}"] = full or GatherSpec(shard.shape, shard.local_view, shard.is_primary, tensor)
        return self._gathered(specs)

    def load_optimizer_state(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restores what optimizer_state gave, in any number of processes. state_dict: on rank 0; the others' may be
        empty.

        Raises UserError where the names or shapes do not match.
        """
        expected = self.optimizer_state().meta
        if self.dist_context.rank == 0:
            if mismatched := sorted(state_dict.keys() ^ expected.keys()):
                raise UserError(
                    f"the optimizer's state is of another optimizer, or of other weights: {', '.join(mismatched[:5])}. "
                    "--resume_no_optimze true goes on without it, or of a pretrained_model --only_load_model true"
                )
            if mismatched := [name for name, meta in expected.items() if state_dict[name].shape != meta.shape]:
                raise UserError(f"the optimizer's state of {mismatched[0]} has another shape than the model's weight")
        scalars = self._broadcast_from_rank0(torch.Size([3]), state_dict.get("numbers"))
        self._optimizer.step_count.copy_(scalars[0])
        _, scale, good_steps = scalars.tolist()
        self.loss_scaler.good_steps = int(good_steps)
        if self.loss_scaler.growth_interval:
            self.loss_scaler.scale = scale
        for name, key in self._state_keys():
            shard, param_optimizer = self._shards[name], self._optimizer.param_optimizers[name]
            replicated_shape = param_optimizer.replicated_shape(name, key)
            full = self._broadcast_from_rank0(
                shard.shape if replicated_shape is None else replicated_shape, state_dict.get(f"{name}.{key}")
            )
            param_optimizer.load_state(name, key, shard.local_view(full) if replicated_shape is None else full)

    def load_ema_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restores what ema_weights gave. state_dict: as for load_optimizer_state."""
        for name, mean in self._optimizer.ema.items():
            shard = self._shards[name]
            mean.copy_(shard.local_view(self._broadcast_from_rank0(shard.shape, state_dict.get(name))))

    def _scalars(self) -> torch.Tensor:
        return torch.tensor([float(self._optimizer.step_count), self.loss_scaler.scale, self.loss_scaler.good_steps])

    def _state_keys(self) -> list[tuple[str, str]]:
        """The keys of the optimizer's state, each with the name of its weight."""
        param_optimizers = self._optimizer.param_optimizers
        return [
            (name, key)
            for name, param_optimizer in param_optimizers.items()
            for key in saved_keys(param_optimizer, name)
        ]

    def _gathered(self, specs: dict[str, GatherSpec]) -> GatheredStateDict:
        return GatheredStateDict(specs, self.device, self.dist_context.world_size, self.dist_context.background_group)

    def _all_gather_full(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor, fp32, on the device of every process, from the parts of all."""
        shard = self._shards[name]
        full = torch.zeros(shard.shape, device=self.device)
        if shard.is_primary:
            shard.local_view(full).copy_(local)
        return self._all_reduce_sum(full)

    def _local_view(self, name: str, full: torch.Tensor) -> torch.Tensor:
        return self._shards[name].local_view(full)

    def _broadcast_from_rank0(
        self, shape: torch.Size, content: torch.Tensor | Callable[[torch.Tensor], None] | None
    ) -> torch.Tensor:
        """A whole tensor on the device of every process. content: on rank 0, its values or what writes them."""
        full = torch.empty(shape, device=self.device)
        if self.dist_context.rank == 0:
            assert content is not None
            content(full) if callable(content) else full.copy_(content)
        return self._broadcast(full)

    @abstractmethod
    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor, which becomes rank 0's on every process."""


def _identity(full: torch.Tensor) -> torch.Tensor:
    return full
