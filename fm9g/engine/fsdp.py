"""The plain torch engine: FSDP2 over one process or many, with tensor parallelism, on CPUs or GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, Shard

from fm9g.engine.base import Engine, ParallelConfig, ShardInfo, WeightInit
from fm9g.engine.comm_timer import CommTimer
from fm9g.engine.tensor_parallel import apply_tensor_parallel


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: a GPU that has it, or a CPU with matrix instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class FSDPEngine(Engine):
    """See fm9g.engine.base.Engine.

    Every model is placed by FSDP2, whatever the number of processes: one process is a mesh of one, and whole copies
    (zero_level 0, what DDP does) are shards among one, added up over the others after the last micro-batch.
    """

    def _shard_model(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        init_weight: WeightInit,
        parallel_config: ParallelConfig,
    ) -> torch.nn.Module:
        world, tp = self.dist_context.world_size, parallel_config.tp_size
        dp_replicate = world // tp if parallel_config.zero_level == 0 else 1
        dp_shard = world // tp // dp_replicate
        mesh = init_device_mesh(
            self.device.type, (dp_replicate, dp_shard, tp), mesh_dim_names=("dp_replicate", "dp_shard", "tp")
        )
        self._mesh, self.dp_rank, self.dp_size = mesh, self.dist_context.rank // tp, world // tp
        if tp > 1:
            apply_tensor_parallel(model, mesh["tp"], parallel_config.sequence_parallel)
        policy = MixedPrecisionPolicy(
            param_dtype=None if parallel_config.dtype == torch.float32 else parallel_config.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay fp32
        )
        apply_fsdp = functools.partial(
            fully_shard,
            mesh=mesh["dp_replicate", "dp_shard"] if dp_replicate > 1 else mesh["dp_shard"],
            mp_policy=policy,
        )
        for weight in model.parameters():
            if parallel_config.frozen_in_compute_dtype and not weight.requires_grad:
                weight.data = weight.data.to(parallel_config.dtype)
        for layer in layers:
            apply_fsdp(layer, reshard_after_forward=parallel_config.zero_level == 3)
        apply_fsdp(model, reshard_after_forward=False)  # what is outside the layers is needed again at once
        for unit in model.modules():
            if isinstance(unit, FSDPModule):  # gradients are added up: the loss is already divided
                if dp_shard > 1:
                    unit.set_custom_all_gather(_TimedAllGather(self.comm_timer))
                    unit.set_custom_reduce_scatter(_TimedReduceScatter(self.comm_timer))
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=self.device)
        for name, weight in self._named_params(model):
            full = self._broadcast_from_rank0(weight.shape, functools.partial(init_weight, name))
            local = _local_tensor(weight)
            local.copy_(_local_view(full, weight, mesh))
        return model

    def _local_shards(self) -> dict[str, ShardInfo]:
        dp_replicate, tp = self._mesh["dp_replicate"], self._mesh["tp"]
        shards = {}
        for name, weight in self._named_params(self._model):
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
            self._model.set_requires_all_reduce(is_last_micro_batch)  # type: ignore[operator]
        super().backward(loss, is_last_micro_batch)

    def _all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        dist.broadcast(values, 0)
        return values


class _Timed:
    """Put before one of FSDP2's messages, it has a stopwatch run meanwhile."""

    def __init__(self, comm_timer: CommTimer) -> None:
        self._comm_timer = comm_timer

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        with self._comm_timer:
            return super().__call__(*arguments, **keywords)  # type: ignore[misc]


class _TimedAllGather(_Timed, DefaultAllGather): ...


class _TimedReduceScatter(_Timed, DefaultReduceScatter): ...


def _local_tensor(weight: torch.nn.Parameter) -> torch.Tensor:
    # Asked for each time: FSDP2 may move a weight when it first runs.
    return weight.detach().to_local()  # type: ignore[attr-defined, operator]


def _local_grad(weight: torch.nn.Parameter) -> torch.Tensor | None:
    return None if weight.grad is None else weight.grad.to_local()  # type: ignore[attr-defined]


def _local_view(full: torch.Tensor, weight: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    """What this process holds of a weight: its piece by tensor parallelism, of that its rows by FSDP2."""
    if (dim := _tp_shard_dim(weight)) is not None:
        full = _local_chunk(full, mesh["tp"], dim)
    return _local_chunk(full, mesh["dp_shard"], 0)


def _tp_shard_dim(weight: DTensor) -> int | None:
    """The dimension that tensor parallelism splits."""
    tp_placement = weight.placements[-1]
    return (
        tp_placement.dim
        if "tp" in (weight.device_mesh.mesh_dim_names or ()) and isinstance(tp_placement, Shard)
        else None
    )


def _local_chunk(full: torch.Tensor, mesh: DeviceMesh, dim: int) -> torch.Tensor:
    chunks = full.chunk(mesh.size(), dim)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else full.narrow(dim, 0, 0)
