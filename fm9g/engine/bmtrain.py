"""The bmtrain engine: ZeRO-2 and ZeRO-3 on GPUs.

How bmtrain splits a model over two processes:

                                                                           rank 0              rank 1
    outside the layers: each weight by itself, flat   input_embedding    [ first half        | second half       ]
    each layer, a Block: one flat buffer of all       encoder.layers.0   [ q k v out ... w_0 | w_0 ... w_1 w_out ]
    its weights, cut in the middle of any weight

A Block gathers its buffer before its forward pass and again before its backward pass (with ZeRO-2 it stays in between),
then reduces and scatters the buffer of gradients. Modules keep their names: each gets a subclass of its class that
reads its weights from the buffer. Weights have the dtype of the computation, and the optimizer has fp32 masters.
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
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import register_rendezvous_handler

from fm9g.engine.base import Engine, ParallelConfig, WeightInit
from fm9g.engine.collectives import Collectives
from fm9g.engine.dist_context import NO_TIMEOUT, DistContext
from fm9g.engine.shards import ShardInfo
from fm9g.errors import UserError

_SCHEME = "fm9g"  # of the rendezvous address by which bmtrain gets the store of our processes


class BMTrainCollectives(Collectives):
    """By bmtrain's communicator of all processes."""

    def __init__(self, rank: int, device: torch.device, bmtrain: Any) -> None:
        super().__init__(rank, device)
        self._bmt = bmtrain

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        storage: Any = values.storage()
        self._bmt.nccl.allReduce(storage, storage, "sum", self._bmt.config["comm"])
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        storage: Any = values.storage()
        self._bmt.nccl.broadcast(storage, storage, 0, self._bmt.config["comm"])
        return values


class BMTrainEngine(Engine):
    """See fm9g.engine.base.Engine."""

    def __init__(self, dist_context: DistContext, seed: int) -> None:
        """Raises UserError if bmtrain cannot be used here."""
        self._bmt = _import_bmtrain()
        super().__init__(dist_context, seed, BMTrainCollectives(dist_context.rank, dist_context.device, self._bmt))
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
            full = self._collectives.broadcast_from_rank0(weight.shape, content).to(parallel_config.dtype)
            module_name, _, key = name.rpartition(".")
            modules[module_name]._parameters[key] = bmt.DistributedParameter(full, requires_grad=weight.requires_grad)
        for module in modules.values():
            cls = type(module)
            module.__class__ = type(cls.__name__, (cls, bmt.DistributedModule), {})
        for i, layer in enumerate(layers):
            # Single blocks, not bmtrain's lists of them, in which frozen layers keep others from being released.
            # Without its checkpointing: ours is inside the layer, the same under every engine.
            layers[i] = block = bmt.Block(layer, use_checkpoint=False, zero_level=parallel_config.zero_level)
            if any(weight.requires_grad for weight in layer.parameters()):
                block.register_forward_pre_hook(_require_input_grad)
        self._fp32_grads: dict[str, torch.Tensor] = {}
        return model

    def _local_shards(self) -> dict[str, ShardInfo]:
        shards = {}
        for name, weight in self._named_params(self.model):
            start = weight._start_partition
            start_offset, end = (0, 0) if start is None else (start, max(start, weight._end_partition))
            shards[name] = ShardInfo(
                shape=weight._original_shape,
                local_view=functools.partial(
                    _flat_slice, start=start_offset, end=min(end, weight._original_shape.numel())
                ),
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
        # Reductions may still run on bmtrain's second stream.
        torch.cuda.current_stream().wait_stream(self._bmt.config["load_stream"])
        if self._parallel_config.dtype != torch.float32 and (self._fp32_grads or not is_last_micro_batch):
            self._accumulate_fp32_grads()
        if is_last_micro_batch:
            for module in self.model.modules():
                if isinstance(module, self._bmt.Block):  # with ZeRO-2 it would not free its gathered weights
                    module._layer_dict.clear()

    def _accumulate_fp32_grads(self) -> None:
        """Moves gradients into fp32 sums: in half precision, a sum of many micro-batches would lose the small ones."""
        for name, weight in self._named_params(self.model):
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
        # In place: the gradients of a layer are views of one buffer, which bmtrain keeps.
        self._fp32_grads.clear()
        for weight in self.model.parameters():
            if weight.grad is not None:
                weight.grad.zero_()


def _flat_slice(full: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return full.view(-1)[start:end]


def _require_input_grad(block: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sets requires_grad on a block's input, even if all earlier layers are frozen.

    Otherwise bmtrain recomputes the block in the backward pass, whatever use_checkpoint says, and with other results.
    """
    x, *others = arguments
    return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_(), *others


def _import_bmtrain() -> Any:
    try:
        import bmtrain
    except Exception as error:  # a wheel for another Python, CUDA or NCCL fails in many ways
        raise UserError(
            f"engine bmtrain: the package cannot be used here ({type(error).__name__}: {error}). `fm9g doctor` shows "
            "what is wrong; --engine torch works without it"
        ) from None
    return bmtrain


def _rendezvous(dist_context: DistContext) -> None:
    """Registers a rendezvous handler that gives bmtrain the store of our processes."""

    def handler(*_: Any, **__: Any) -> Iterator[Any]:
        yield PrefixStore("fm9g-bmtrain", dist_context.store), dist_context.rank, dist_context.world_size

    with contextlib.suppress(RuntimeError):  # registered by an earlier engine of this process
        register_rendezvous_handler(_SCHEME, handler)


@contextlib.contextmanager
def _preserve_process_state(dist_context: DistContext) -> Iterator[None]:
    """Sets the variables that bmtrain's init_distributed reads, keeps it quiet, and undoes its side effects.

    It binds the process to a few cores, which workers of the data loader would inherit, sets the number of threads,
    turns cudnn off, and sets the timeout of our store.
    """
    rank_env = {
        "RANK": dist_context.rank,
        "WORLD_SIZE": dist_context.world_size,
        "LOCAL_RANK": dist_context.local_rank,
        "LOCAL_WORLD_SIZE": dist_context.local_world_size,
    }
    saved_env = {name: os.environ.get(name) for name in (*rank_env, "MASTER_ADDR", "MASTER_PORT")}
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
        dist_context.store.set_timeout(NO_TIMEOUT)
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
        torch.backends.cudnn.enabled = cudnn
