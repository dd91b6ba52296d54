"""Logits of a model of any size, in fp32 on the CPU, with the weights of one layer in memory at a time.

T: tokens of all prompts, C: hidden size, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fm9g.config.model import ModelConfig
from fm9g.model.prompt_batch import prompt_batch
from fm9g.model.transformer import FM9G

ReadWeight = Callable[[str], torch.Tensor]
LayerHook = Callable[[nn.Module, int], None]

_HEAD_ROWS = 4096  # of the output weights in fp32 at a time


class _Embedding(nn.Module):
    """An embedding that reads its weight on each call."""

    def __init__(self, read: ReadWeight) -> None:
        super().__init__()
        self._read = read

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._read("input_embedding.weight")[ids].float()


@torch.no_grad()
def streamed_logits(
    config: ModelConfig, read: ReadWeight, prompts: list[list[int]], layer_hook: LayerHook | None = None, last: int = 0
) -> list[torch.Tensor]:
    """The logits (T, V) of each prompt. Prompts do not attend to one another.

    Args:
        read: returns a weight by its 9G name, in any floating-point type; called once per weight.
        layer_hook: called with each layer, its weights in fp32, and its number before it runs; may change the layer.
        last: tokens at the end of each prompt that get logits; 0: all.
    """
    with torch.device("meta"):
        model = FM9G(config).eval()
    model.input_embedding = _Embedding(read)  # type: ignore[assignment]
    for number, layer in enumerate(model.encoder.layers):
        layer.register_forward_pre_hook(_materialize(f"encoder.layers.{number}.", read, layer_hook, number))
        layer.register_forward_hook(_release)
    model.encoder.output_layernorm.register_forward_pre_hook(_materialize("encoder.output_layernorm.", read))
    hidden = model.hidden_states(prompt_batch(prompts))
    last_rows = [rows[-last:] for rows in torch.split(hidden, [len(prompt) for prompt in prompts])]
    hidden = torch.cat(last_rows)  # (T, C)
    head = read("input_embedding.weight" if config.tie_word_embeddings else "lm_head.weight")
    logits = torch.cat([F.linear(hidden, rows.float()) for rows in torch.split(head, _HEAD_ROWS)], dim=-1)  # (T, V)
    return list(torch.split(logits, [len(rows) for rows in last_rows]))


def _materialize(
    prefix: str, read: ReadWeight, layer_hook: LayerHook | None = None, number: int = 0
) -> Callable[..., None]:
    """A hook that reads the weights of a module on the meta device."""

    def read_weights(module: nn.Module, inputs: object) -> None:
        weights = {name: read(prefix + name).float() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        if layer_hook:
            layer_hook(module, number)

    return read_weights


def _release(module: nn.Module, inputs: object, outputs: object) -> None:
    module.to_empty(device="meta")
