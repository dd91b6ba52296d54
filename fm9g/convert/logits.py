"""Logits of a model of any size, in fp32 on the host, with the weights of one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fm9g.config.model import ModelConfig
from fm9g.model.transformer import FM9G, Batch

ReadWeight = Callable[[str], torch.Tensor]
LayerHook = Callable[[nn.Module, int], None]

_ROWS = 4096  # of the output weights in fp32 at a time


class _Embedding(nn.Module):
    """An embedding whose weight is read when it is called for."""

    def __init__(self, read: ReadWeight) -> None:
        super().__init__()
        self._read = read

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._read("input_embedding.weight")[ids].float()


@torch.no_grad()
def streamed_logits(
    config: ModelConfig, read: ReadWeight, prompts: list[list[int]], layer_hook: LayerHook | None = None, last: int = 0
) -> list[torch.Tensor]:
    """The (tokens, V) logits of each prompt, which see nothing of each other.

    read: gives a weight by its 9G name, in any floating-point type; it is called once for each. layer_hook: is shown
    each layer with its weights in fp32, and its number, before it is used, and may change it.
    last: so many tokens at the
    end of each prompt have logits; 0: all.
    """
    with torch.device("meta"):
        model = FM9G(config).eval()
    model.input_embedding = _Embedding(read)  # type: ignore[assignment]
    for number, layer in enumerate(model.encoder.layers):
        layer.register_forward_pre_hook(_materialize(f"encoder.layers.{number}.", read, layer_hook, number))
        layer.register_forward_hook(_release)
    model.encoder.output_layernorm.register_forward_pre_hook(_materialize("encoder.output_layernorm.", read))
    rows_of_prompts = model.hidden_states(_batch(prompts)).split([len(prompt) for prompt in prompts])
    last_rows = [rows[-last:] for rows in rows_of_prompts]
    hidden = torch.cat(last_rows)  # (tokens, C)
    head = read("input_embedding.weight" if config.tie_word_embeddings else "lm_head.weight")
    logits = torch.cat([F.linear(hidden, rows.float()) for rows in head.split(_ROWS)], dim=-1)
    return list(logits.split([len(rows) for rows in last_rows]))


def _materialize(
    prefix: str, read: ReadWeight, layer_hook: LayerHook | None = None, number: int = 0
) -> Callable[..., None]:
    """A hook that gives a module on the meta device its weights."""

    def fill(module: nn.Module, inputs: object) -> None:
        weights = {name: read(prefix + name).float() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        if layer_hook:
            layer_hook(module, number)

    return fill


def _release(module: nn.Module, inputs: object, outputs: object) -> None:
    module.to_empty(device="meta")


def _batch(prompts: list[list[int]]) -> Batch:
    seqlens = [len(prompt) for prompt in prompts]
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.tensor([token for prompt in prompts for token in prompt]),
        positions=torch.cat([torch.arange(length) for length in seqlens]),
        cu_seqlens=torch.tensor([0, *seqlens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seqlens=seqlens,
        target_positions=nothing,
        targets=nothing,
    )
