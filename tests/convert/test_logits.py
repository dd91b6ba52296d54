"""Logits with one layer in memory equal those of the full model."""

import gc

import pytest
import torch
from helpers.common import make_batch, small_model
from torch import nn

from fm9g.convert.logits import streamed_logits
from fm9g.model.transformer import FM9G

KINDS: dict[str, dict] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "scaled": {"scale": True, "scale_emb": 12.0, "scale_depth": 1.4, "base_hidden_size": 16},
    "norms": {"qk_norm": True, "qkv_bias": True},
}


def make(changes: dict) -> tuple[FM9G, list[list[int]], torch.Tensor]:
    model = FM9G(small_model(**changes))
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=1)
    batch = make_batch()
    with torch.no_grad():
        logits = model.logits(batch)
    return model, [ids.tolist() for ids in batch.input_ids.split(batch.seqlens)], logits


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_logits_are_those_of_the_model(kind: str) -> None:
    model, prompts, expected = make(KINDS[kind])
    weights = dict(model.named_parameters())
    read = streamed_logits(model.config, lambda name: weights[name].detach(), prompts)
    assert [len(logits) for logits in read] == [len(prompt) for prompt in prompts]
    torch.testing.assert_close(torch.cat(read), expected)


def test_each_weight_is_read_once_and_a_layer_at_a_time() -> None:
    model, prompts, _ = make({})
    weights = dict(model.named_parameters())
    names: list[str] = []

    def read(name: str) -> torch.Tensor:
        names.append(name)
        return weights[name].detach().bfloat16()

    full = set(map(id, model.encoder.layers))
    in_memory = []

    def change(layer: nn.Module, number: int) -> None:
        assert all(weight.dtype == torch.float32 for weight in layer.parameters())
        layers = [other for other in gc.get_objects() if type(other) is type(layer) and id(other) not in full]
        in_memory.append([not all(weight.is_meta for weight in other.parameters()) for other in layers])

    streamed_logits(model.config, read, prompts, change)
    assert sorted(names) == sorted(weights)
    assert [sum(filled) for filled in in_memory] == [1, 1]


def test_layers_can_be_changed() -> None:
    model, prompts, before = make({})
    weights = dict(model.named_parameters())

    def change(layer: nn.Module, number: int) -> None:
        if number == 1:
            layer.ffn.ffn.w_out.weight.zero_()

    after = streamed_logits(model.config, lambda name: weights[name].detach(), prompts, change)
    assert not torch.allclose(torch.cat(after), before)
    weights["encoder.layers.1.ffn.ffn.w_out.weight"].data.zero_()
    with torch.no_grad():
        expected = model.logits(make_batch())
    torch.testing.assert_close(torch.cat(after), expected)
