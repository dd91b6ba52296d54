"""Prompts as a packed row without targets: for logits, not for a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fm9g.model.transformer import Batch


def prompt_batch(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Packs prompts, which do not attend to each other.

    Args:
        prompts: token ids of each prompt.
        device: of the model.
    """
    seqlens = [len(prompt) for prompt in prompts]
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return Batch(
        input_ids=torch.tensor([token for prompt in prompts for token in prompt], device=device),
        positions=torch.cat([torch.arange(length, device=device) for length in seqlens]),
        cu_seqlens=torch.tensor([0, *seqlens], device=device).cumsum(0, dtype=torch.int32),
        seqlens=seqlens,
        target_positions=nothing,
        targets=nothing,
    )
