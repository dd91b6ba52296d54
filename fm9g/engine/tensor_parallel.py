"""Applies a model's plan of tensor parallelism (fm9g.model.sharding) by torch's parallel styles.

Shapes: T tokens of a packed row, C hidden size, N rows of logits, V token ids of this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fm9g.model.loss import VocabShard
from fm9g.model.sharding import ModuleSplit, Split


def apply_tensor_parallel(
    model: torch.nn.Module, plan: Mapping[str, ModuleSplit], mesh: DeviceMesh, sequence_parallel: bool
) -> None:
    """Splits the modules of a plan over a mesh, and gives the model the part of the vocabulary that is left here.

    Args:
        plan: module name, with * for any number, to its split.
        sequence_parallel: between split modules each process has T / mesh.size() tokens; else all T.
    """
    module_names = {name for name, _ in model.named_modules()}
    styles = {
        name: style
        for name, module_split in plan.items()
        if name.replace("*", "0") in module_names
        and (style := _parallel_style(module_split, sequence_parallel)) is not None
    }
    trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    parallelize_module(model, mesh, styles)
    for name, weight in model.named_parameters():  # new parameters, which all require a gradient
        weight.requires_grad_(trainable[name])
    model.vocab_shard = TensorParallelVocab(mesh)  # type: ignore[assignment]


def _parallel_style(module_split: ModuleSplit, sequence_parallel: bool) -> ParallelStyle | None:
    """torch's parallel style for a split; None: the module works as it is."""
    outside: Placement = Shard(0) if sequence_parallel else Replicate()
    split, others = module_split.split, (None,) * (module_split.num_inputs - 1)
    if split is Split.COLWISE:
        return ColwiseParallel()
    if split is Split.ROWWISE:
        return RowwiseParallel(output_layouts=outside)
    if split is Split.EMBEDDING:
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=outside)
    if split is Split.GATHER_TOKENS:
        layouts: Any = {"input_layouts": (outside, *others), "desired_input_layouts": (Replicate(), *others)}
        return PrepareModuleInput(**layouts)
    if not sequence_parallel:
        return None
    return _GatheredOutput(sequence_dim=0) if split is Split.SEQUENCE_THEN_GATHER else SequenceParallel(sequence_dim=0)


class _GatheredOutput(SequenceParallel):
    """A sequence-parallel norm whose output (T, C) is on every process."""

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, module: torch.nn.Module, outputs: Any, mesh: Any) -> Any:
        return outputs.redistribute(placements=(Replicate(),)).to_local()


class TensorParallelVocab(VocabShard):
    """The token ids of this process where the output weight is split by rows over a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._rank, self._size, self._group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def local_rows(self, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        rows_per_rank = -(-len(weight) // self._size)
        local: torch.Tensor = weight.to_local()  # type: ignore[attr-defined]
        return local, rows_per_rank * self._rank

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, group=self._group)
        return values

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, 1) from this process's logits (N, V)."""
        max_logits = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(max_logits, dist.ReduceOp.MAX, self._group)
        return self.all_reduce_sum((logits - max_logits).exp_().sum(dim=-1, keepdim=True)).log_() + max_logits
