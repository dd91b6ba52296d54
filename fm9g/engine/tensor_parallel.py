"""Which weights of a 9G model tensor parallelism splits, and where tokens are exchanged (Shoeybi et al. 2019; the
sequence-parallel norms: Korthikanti et al. 2022).

Shapes: T tokens of a packed row, C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
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


class _ReplicatedOutput(SequenceParallel):
    """A sequence-parallel norm whose output (T, C) is on every process."""

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, module: torch.nn.Module, outputs: Any, mesh: Any) -> Any:
        return outputs.redistribute(placements=(Replicate(),)).to_local()


def apply_tensor_parallel(model: torch.nn.Module, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Splits attention by heads, the feed-forward layers by their width, embedding and output by the vocabulary.

    sequence_parallel: between them each process holds T / tp tokens, and norms only these; else every process holds
    all.
    """
    outer_layout: Placement = Shard(0) if sequence_parallel else Replicate()
    # Attention also gets cos, sin, cu_seqlens and lengths, which are the same everywhere.
    attention_inputs: dict[str, Any] = {
        "input_layouts": (outer_layout, None, None, None, None),
        "desired_input_layouts": (Replicate(), None, None, None, None),
    }
    layer_plan: dict[str, ParallelStyle] = {
        "self_att.self_attention": PrepareModuleInput(**attention_inputs),
        "self_att.self_attention.project_q": ColwiseParallel(),
        "self_att.self_attention.project_k": ColwiseParallel(),
        "self_att.self_attention.project_v": ColwiseParallel(),
        "self_att.self_attention.attention_out": RowwiseParallel(output_layouts=outer_layout),
        "ffn.ffn": PrepareModuleInput(input_layouts=(outer_layout,), desired_input_layouts=(Replicate(),)),
        "ffn.ffn.w_in.w_0": ColwiseParallel(),
        "ffn.ffn.w_in.w_1": ColwiseParallel(),
        "ffn.ffn.w_out": RowwiseParallel(output_layouts=outer_layout),
    }
    root_plan: dict[str, ParallelStyle] = {
        "input_embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=outer_layout),
        "lm_head": ColwiseParallel(),  # its weight alone is used: model/loss.py
    }
    if sequence_parallel:
        layer_plan["self_att.layernorm_before_attention"] = SequenceParallel(sequence_dim=0)
        layer_plan["ffn.layernorm_before_ffn"] = SequenceParallel(sequence_dim=0)
        root_plan["encoder.output_layernorm"] = _ReplicatedOutput(sequence_dim=0)
    plan = root_plan | {f"encoder.layers.*.{name}": style for name, style in layer_plan.items()}
    module_names = {name for name, _ in model.named_modules()}
    plan = {name: style for name, style in plan.items() if name.replace("*", "0") in module_names}
    trainable = {name: weight.requires_grad for name, weight in model.named_parameters()}
    parallelize_module(model, mesh, plan)
    for name, weight in model.named_parameters():  # it makes some weights anew, which ask for a gradient
        weight.requires_grad_(trainable[name])
