"""How tensor parallelism splits a 9G model over processes, as data; fm9g.engine.tensor_parallel applies it.

One branch of a layer on one of two processes (Shoeybi et al. 2019; with split tokens: Korthikanti et al. 2022):

    x (T/2, C)       half of the tokens      SEQUENCE       layernorm_before_attention
       | all-gather                          GATHER_TOKENS  self_attention
    x (T, C)         all tokens
       |                                     COLWISE        project_q, project_k, project_v
    q (T, H/2, D)    half of the heads
       | attention of these heads
    o (T, C/2)
       |                                     ROWWISE        attention_out
    y (T, C)         a partial sum
       | reduce-scatter
    y (T/2, C)       half of the tokens, added to x

The feed-forward branch is split likewise: w_0 and w_1 by columns of their output, w_out by rows of its input. Without
sequence parallelism every process has all tokens outside of the branches, and an all-reduce takes the place of both
messages.

Shapes: T tokens of a packed row, C hidden size, H query heads, D width of a head.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Split(enum.Enum):
    """What a module does on each process."""

    COLWISE = "a linear layer computes some of its outputs from complete inputs"
    ROWWISE = "a linear layer computes a partial sum from some of its inputs; the sums are added up"
    EMBEDDING = "an embedding looks up the token ids that it has; the others are zeros, and the results are added up"
    GATHER_TOKENS = "the first input of a module becomes complete: that of all tokens"
    SEQUENCE = "a norm works on some of the tokens; skipped without sequence parallelism"
    SEQUENCE_THEN_GATHER = "like SEQUENCE, and its output becomes complete"


@dataclass(frozen=True)
class ModuleSplit:
    """The split of one module.

    Args:
        num_inputs: positional arguments of its forward; those after the first are the same on every process.
    """

    split: Split
    num_inputs: int = 1


_ATTENTION, _FFN = "encoder.layers.*.self_att", "encoder.layers.*.ffn"

# Name of a module, * for the number of a layer. A module that a model lacks is skipped.
TENSOR_PARALLEL_PLAN: dict[str, ModuleSplit] = {
    "input_embedding": ModuleSplit(Split.EMBEDDING),
    f"{_ATTENTION}.layernorm_before_attention": ModuleSplit(Split.SEQUENCE),
    f"{_ATTENTION}.self_attention": ModuleSplit(Split.GATHER_TOKENS, num_inputs=5),  # x, cos, sin, cu_seqlens, seqlens
    f"{_ATTENTION}.self_attention.project_q": ModuleSplit(Split.COLWISE),
    f"{_ATTENTION}.self_attention.project_k": ModuleSplit(Split.COLWISE),
    f"{_ATTENTION}.self_attention.project_v": ModuleSplit(Split.COLWISE),
    f"{_ATTENTION}.self_attention.attention_out": ModuleSplit(Split.ROWWISE),
    f"{_FFN}.layernorm_before_ffn": ModuleSplit(Split.SEQUENCE),
    f"{_FFN}.ffn": ModuleSplit(Split.GATHER_TOKENS),
    f"{_FFN}.ffn.w_in.w_0": ModuleSplit(Split.COLWISE),
    f"{_FFN}.ffn.w_in.w_1": ModuleSplit(Split.COLWISE),
    f"{_FFN}.ffn.w_out": ModuleSplit(Split.ROWWISE),
    "encoder.output_layernorm": ModuleSplit(Split.SEQUENCE_THEN_GATHER),
    "lm_head": ModuleSplit(Split.COLWISE),  # only its weight is used, by the loss
}
