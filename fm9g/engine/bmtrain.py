"""The bmtrain engine: ZeRO-2 and ZeRO-3 on GPUs.

bmtrain shards each layer as one flat buffer, and each weight outside the layers by itself; the model's modules only get
another way to their weights. Weights are of the computation's type, and the optimizer keeps the fp32 ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

from fm9g.engine.base import Engine, ParallelConfig, ShardInfo, WeightInit
from fm9g.engine.dist_context import DistContext
from fm9g.errors import UserError

_SCHEME = "fm9g"  # of the address under which bmtrain finds the store of our processes


class BMTrainEngine(Engine):
    """See fm9g.engine.base.Engine."""

    def __init__(self, dist_context: DistContext, seed: int) -> None:
        """Raises UserError where bmtrain cannot be used here."""
        super().__init__(dist_context, seed)
        self._bmt = _import_bmtrain()
        if not self._bmt.config["initialized"]:
            _rendezvous(dist_context)
            with _preserve_process_state(dist_context):
                self._bmt.init_distributed(init_method=f"{_SCHEME}://", seed=seed % 2**32)

    def _shard_model(
        self,
        model: torch.nn.Module,
        layers: torch.nn.ModuleList,
        init_weight: WeightInit,
        parallel_config: ParallelConfig,
    ) -> torch.nn.Module:
        bmt = self._bmt
        modules = dict(model.named_modules())
        for name, weight in list(model.named_parameters()):
            content = functools.partial(init_weight, self._export_name(name))
            full = self._broadcast_from_rank0(weight.shape, content).to(parallel_config.dtype)
            module_name, _, key = name.rpartition(".")
            modules[module_name]._parameters[key] = bmt.DistributedParameter(full, requires_grad=weight.requires_grad)
        for module in modules.values():
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind, bmt.DistributedModule), {})
        for number, layer in enumerate(layers):
            # Both ends of a list by itself: in bmtrain's lists, frozen layers keep others from being released.
            # Checkpointing is done inside, so that it is the same under every engine.
            layers[number] = block = bmt.Block(layer, use_checkpoint=False, zero_level=parallel_config.zero_level)
            if any(weight.requires_grad for weight in layer.parameters()):
                block.register_forward_pre_hook(_require_input_grad)
        self._fp32_grads: dict[str, torch.Tensor] = {}
        return model

    def _local_shards(self) -> dict[str, ShardInfo]:
        shards = {}
        for name, weight in self._named_params(self._model):
            start = weight._start_partition
            begin, end = (0, 0) if start is None else (start, max(start, weight._end_partition))
            shards[name] = ShardInfo(
                shape=weight._original_shape,
                local_view=functools.partial(_flat_slice, begin=begin, end=min(end, weight._original_shape.numel())),
                num_replicas=1,
                is_primary=True,
                trainable=weight.requires_grad,
                tensor=weight.detach,
                grad=functools.partial(self._grad, name, weight),
            )
        return shards

    def _grad(self, name: str, weight: torch.nn.Parameter) -> torch.Tensor | None:
        return self._fp32_grads.get(name, weight.grad)

    def backward(self, loss: torch.Tensor, is_last_micro_batch: bool) -> None:
        super().backward(loss, is_last_micro_batch)
        # Reductions may still run on bmtrain's other stream.
        torch.cuda.current_stream().wait_stream(self._bmt.config["load_stream"])
        if self._parallel_config.dtype != torch.float32 and (self._fp32_grads or not is_last_micro_batch):
            self._accumulate_fp32_grads()
        if is_last_micro_batch:
            for module in self._model.modules():
                if isinstance(module, self._bmt.Block):  # with ZeRO-2 it would keep its gathered weights
                    module._layer_dict.clear()

    def _accumulate_fp32_grads(self) -> None:
        """Moves gradients into fp32 sums: those of many micro-batches would drown in 8 bits."""
        for name, weight in self._named_params(self._model):
            if weight.grad is not None:
                if name in self._fp32_grads:
                    self._fp32_grads[name] += weight.grad
                else:
                    self._fp32_grads[name] = weight.grad.float()
                weight.grad.zero_()

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        norm = super().step(lr, max_norm)
        self._bmt.config["load_stream"].wait_stream(torch.cuda.current_stream())
        return norm

    def zero_grad(self) -> None:
        # In place: a layer's gradients are views of a buffer that it keeps.
        self._fp32_grads.clear()
        for weight in self._model.parameters():
            if weight.grad is not None:
                weight.grad.zero_()

    def _all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        self._bmt.nccl.allReduce(values.storage(), values.storage(), "sum", self._bmt.config["comm"])
        return values

    def _broadcast(self, values: torch.Tensor) -> torch.Tensor:
        self._bmt.nccl.broadcast(values.storage(), values.storage(), 0, self._bmt.config["comm"])
        return values


def _flat_slice(full: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return full.view(-1)[begin:end]


def _require_input_grad(block: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Has a layer's input ask for a gradient, even where all before it is frozen: without, bmtrain recomputes the layer
    whatever it was told, and not as it was computed."""
    x, *others = arguments
    return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_(), *others


def _import_bmtrain() -> Any:
    try:
        import bmtrain
    except Exception as error:  # a wheel for another Python, CUDA or NCCL fails in many ways
        raise UserError(
            f"engine bmtrain: the package cannot be used here ({type(error).__name__}: {error}). `fm9g doctor` says "
            "what is wrong; --engine torch does without"
        ) from None
    return bmtrain


def _rendezvous(dist_context: DistContext) -> None:
    """Has bmtrain meet in the store where our processes have met already."""

    def handler(*_: Any, **__: Any) -> Iterator[Any]:
        yield dist.PrefixStore("fm9g-bmtrain", dist_context.store), dist_context.rank, dist_context.world_size

    with contextlib.suppress(RuntimeError):  # registered by an earlier engine of this process
        register_rendezvous_handler(_SCHEME, handler)


@contextlib.contextmanager
def _preserve_process_state(dist_context: DistContext) -> Iterator[None]:
    """Undoes what bmtrain's start changes beside its own: it reads variables, binds the process to few cores, which its
    data loader's workers would inherit, sets the number of threads, turns cudnn off, sets our store's timeout, and
    prints.
    """
    rank_env = {
        "RANK": dist_context.rank,
        "WORLD_SIZE": dist_context.world_size,
        "LOCAL_RANK": dist_context.local_rank,
        "LOCAL_WORLD_SIZE": dist_context.local_world_size,
    }
    saved_env = {name: os.environ.get(name) for name in (*rank_env, "MASTER_ADDR", "MASTER_PORT")}
    store_timeout = dist_context.store.timeout  # type: ignore[attr-defined]
    affinity, threads, cudnn = os.sched_getaffinity(0), torch.get_num_threads(), torch.backends.cudnn.enabled
    init_module = sys.modules["bmtrain.init"]
    os.environ.update({name: str(value) for name, value in rank_env.items()})
    try:
        with unittest.mock.patch.object(init_module, "print_dict"):
            yield
    finally:
        for name, value in saved_env.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        dist_context.store.set_timeout(store_timeout)
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
        torch.backends.cudnn.enabled = cudnn
