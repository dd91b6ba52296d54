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

from fm9g.engine.base import Engine, Fill, Part, Placement
from fm9g.engine.stopwatch import Stopwatch
from fm9g.engine.tensor_parallel import split_layers


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: a GPU that has it, or a CPU with matrix instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class TorchEngine(Engine):
    """See fm9g.engine.base.Engine.

    Every model is placed by FSDP2, whatever the number of processes: one process is a mesh of one, and whole copies
    (zero_level 0, what DDP does) are shards among one, added up over the others after the last micro-batch.
    """

    def _place(
        self, model: torch.nn.Module, layers: torch.nn.ModuleList, fill: Fill, placement: Placement
    ) -> torch.nn.Module:
        world, tp = self.processes.world_size, placement.tp_size
        copies = world // tp if placement.zero_level == 0 else 1
        shards = world // tp // copies
        mesh = init_device_mesh(self.device.type, (copies, shards, tp), mesh_dim_names=("copies", "shards", "tp"))
        self._mesh, self.replica, self.replicas = mesh, self.processes.rank // tp, world // tp
        if tp > 1:
            split_layers(model, mesh["tp"], placement.sequence_parallel)
        policy = MixedPrecisionPolicy(
            param_dtype=None if placement.dtype == torch.float32 else placement.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay fp32
        )
        shard = functools.partial(
            fully_shard,
            mesh=mesh["copies", "shards"] if copies > 1 else mesh["shards"],
            mp_policy=policy,
        )
        for weight in model.parameters():
            if placement.narrow_frozen and not weight.requires_grad:
                weight.data = weight.data.to(placement.dtype)
        for layer in layers:
            shard(layer, reshard_after_forward=placement.zero_level == 3)
        shard(model, reshard_after_forward=False)  # what is outside the layers is needed again at once
        for unit in model.modules():
            if isinstance(unit, FSDPModule):  # gradients are added up: the loss is already divided
                if shards > 1:
                    unit.set_custom_all_gather(_TimedAllGather(self.messages))
                    unit.set_custom_reduce_scatter(_TimedReduceScatter(self.messages))
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=self.device)
        for name, weight in self._named(model):
            whole = self._spread(weight.shape, functools.partial(fill, name))
            local = _local(weight)
            local.copy_(_region(whole, weight, mesh))
        return model

    def _find_parts(self) -> dict[str, Part]:
        copies, tp = self._mesh["copies"], self._mesh["tp"]
        parts = {}
        for name, weight in self._named(self._model):
            split = _tp_split(weight) is not None
            parts[name] = Part(
                shape=weight.shape,
                region=functools.partial(_region, weight=weight, mesh=self._mesh),
                copies=copies.size() * (1 if split else tp.size()),
                owner=copies.get_local_rank() == 0 and (split or tp.get_local_rank() == 0),
                trainable=weight.requires_grad,
                tensor=functools.partial(_local, weight),
                grad=functools.partial(_local_grad, weight),
            )
        return parts

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if self._placement.zero_level == 0:
            self._model.set_requires_all_reduce(last)  # type: ignore[operator]
        super().backward(loss, last)

    def _add_up(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        dist.broadcast(values, 0)
        return values


class _Timed:
    """Put before one of FSDP2's messages, it has a stopwatch run meanwhile."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        with self._stopwatch:
            return super().__call__(*arguments, **keywords)  # type: ignore[misc]


class _TimedAllGather(_Timed, DefaultAllGather): ...


class _TimedReduceScatter(_Timed, DefaultReduceScatter): ...


def _local(weight: torch.nn.Parameter) -> torch.Tensor:
    # Asked for each time: FSDP2 may move a weight when it first runs.
    return weight.detach().to_local()  # type: ignore[attr-defined, operator]


def _local_grad(weight: torch.nn.Parameter) -> torch.Tensor | None:
    return None if weight.grad is None else weight.grad.to_local()  # type: ignore[attr-defined]


def _region(whole: torch.Tensor, weight: DTensor, mesh: DeviceMesh) -> torch.Tensor:
    """What this process holds of a weight: its piece by tensor parallelism, of that its rows by FSDP2."""
    if (dim := _tp_split(weight)) is not None:
        whole = _piece(whole, mesh["tp"], dim)
    return _piece(whole, mesh["shards"], 0)


def _tp_split(weight: DTensor) -> int | None:
    """The dimension that tensor parallelism splits."""
    last = weight.placements[-1]
    return last.dim if "tp" in (weight.device_mesh.mesh_dim_names or ()) and isinstance(last, Shard) else None


def _piece(whole: torch.Tensor, mesh: DeviceMesh, dim: int) -> torch.Tensor:
    pieces = whole.chunk(mesh.size(), dim)
    number = mesh.get_local_rank()
    return pieces[number] if number < len(pieces) else whole.narrow(dim, 0, 0)
