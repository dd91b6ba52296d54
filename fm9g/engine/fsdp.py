"""The engine of plain torch: FSDP2 on one process or many, with tensor parallelism, on CPUs or GPUs.

The mesh of 8 processes with tp_size 2 (rank = its place in reading order):

                      zero_level 2, 3                          zero_level 0
    dp_replicate      1                                        4
    dp_shard          4: FSDP2 splits rows of weights          1
    tp                2: see fm9g.model.sharding               2
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, Shard

from fm9g.engine.base import Engine, ParallelConfig, WeightInit
from fm9g.engine.collectives import TorchCollectives
from fm9g.engine.comm_timer import CommTimer
from fm9g.engine.dist_context import DistContext
from fm9g.engine.shards import ShardInfo
from fm9g.engine.tensor_parallel import apply_tensor_parallel
from fm9g.model.sharding import TENSOR_PARALLEL_PLAN


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on a device: a GPU with bf16, or a CPU with matrix instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class FSDPEngine(Engine):
    """See fm9g.engine.base.Engine.

    FSDP2 wraps every model: one process is a mesh of one, and with zero_level 0 (as in DDP) each process is a mesh of
    one shard, whose gradients are summed over the replicas after the last micro-batch.
    """

    def __init__(self, dist_context: DistContext, seed: int) -> None:
        super().__init__(dist_context, seed, TorchCollectives(dist_context.rank, dist_context.device))

    def _shard_model(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        init_weight: WeightInit,
        parallel_config: ParallelConfig,
    ) -> torch.nn.Module:
        tp_size = parallel_config.tp_size
        self.dp_rank, self.dp_size = self.dist_context.rank // tp_size, self.dist_context.world_size // tp_size
        self._mesh = self._device_mesh(parallel_config)
        if tp_size > 1:
            apply_tensor_parallel(model, TENSOR_PARALLEL_PLAN, self._mesh["tp"], parallel_config.sequence_parallel)
        for weight in model.parameters():
            if parallel_config.frozen_in_compute_dtype and not weight.requires_grad:
                weight.data = weight.data.to(parallel_config.dtype)
        self._apply_fsdp(model, layers, parallel_config)
        model.to_empty(device=self.device)
        for name, weight in self._named_params(model):
            full = self._collectives.broadcast_from_rank0(weight.shape, functools.partial(init_weight, name))
            local = _local_tensor(weight)
            local.copy_(_local_view(full, weight, self._mesh))
        return model

    def _device_mesh(self, parallel_config: ParallelConfig) -> DeviceMesh:
        dp_replicate = self.dp_size if parallel_config.zero_level == 0 else 1
        return init_device_mesh(
            self.device.type,
            (dp_replicate, self.dp_size // dp_replicate, parallel_config.tp_size),
            mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
        )

    def _apply_fsdp(self, model: torch.nn.Module, layers: torch.nn.ModuleList, parallel_config: ParallelConfig) -> None:
        mesh = self._mesh
        policy = MixedPrecisionPolicy(
            param_dtype=None if parallel_config.dtype == torch.float32 else parallel_config.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay fp32
        )
        apply_fsdp = functools.partial(
            fully_shard,
            mesh=mesh["dp_replicate", "dp_shard"] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"],
            mp_policy=policy,
        )
        for layer in layers:
            apply_fsdp(layer, reshard_after_forward=parallel_config.zero_level == 3)
        apply_fsdp(model, reshard_after_forward=False)  # the backward pass needs weights outside the layers at once
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                if mesh["dp_shard"].size() > 1:
                    unit.set_custom_all_gather(_TimedAllGather(self.comm_timer))
                    unit.set_custom_reduce_scatter(_TimedReduceScatter(self.comm_timer))
                unit.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is already divided
                unit.set_force_sum_reduction_for_comms(True)

    def _local_shards(self) -> dict[str, ShardInfo]:
        dp_replicate, tp = self._mesh["dp_replicate"], self._mesh["tp"]
        shards = {}
        for name, weight in self._named_params(self.model):
            tp_sharded = _tp_shard_dim(weight) is not None
            shards[name] = ShardInfo(
                shape=weight.shape,
                local_view=functools.partial(_local_view, weight=weight, mesh=self._mesh),
                num_replicas=dp_replicate.size() * (1 if tp_sharded else tp.size()),
                is_primary=dp_replicate.get_local_rank() == 0 and (tp_sharded or tp.get_local_rank() == 0),
                trainable=weight.requires_grad,
                tensor=functools.partial(_local_tensor, weight),
                grad=functools.partial(_local_grad, weight),
            )
        return shards

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        if self._parallel_config.zero_level == 0:
            self.model.set_requires_all_reduce(is_last_micro_batch)  # type: ignore[operator]
        super().backward(loss, is_last_micro_batch)


class _Timed:
    """Mixin for FSDP2's messages: a timer runs during each."""

    def __init__(self, comm_timer: CommTimer) -> None:
        self._comm_timer = comm_timer

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        with self._comm_timer:
            return super().__call__(*arguments, **keywords)  # type: ignore[misc]


class _TimedAllGather(_Timed, DefaultAllGather): ...


class _TimedReduceScatter(_Timed, DefaultReduceScatter): ...


def _local_tensor(weight: Any) -> torch.Tensor:
    # Looked up each time: FSDP2 may move a weight in its first forward pass.
    local: torch.Tensor = weight.detach().to_local()
    return local


def _local_grad(weight: Any) -> torch.Tensor | None:
    return None if weight.grad is None else weight.grad.to_local()


def _local_view(full: torch.Tensor, weight: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    """This process's part of a full weight: its piece by tensor parallelism, and of that its rows by FSDP2."""
    if (dim := _tp_shard_dim(weight)) is not None:
        full = _local_chunk(full, mesh["tp"], dim)
    return _local_chunk(full, mesh["dp_shard"], 0)


def _tp_shard_dim(weight: DTensor) -> int | None:
    """The dimension that tensor parallelism splits; None if it does not split this weight."""
    tp_placement = weight.placements[-1]
    has_tp = "tp" in (weight.device_mesh.mesh_dim_names or ())
    return tp_placement.dim if has_tp and isinstance(tp_placement, Shard) else None


def _local_chunk(full: torch.Tensor, mesh: DeviceMesh, dim: int) -> torch.Tensor:
    chunks = full.chunk(mesh.size(), dim)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else full.narrow(dim, 0, 0)
