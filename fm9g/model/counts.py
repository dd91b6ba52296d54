"""Counts of a model's weights and floating-point operations, derived from its configuration. Light: no torch.

Shapes: C hidden size, Q and K widths of all query heads and of all key heads, F intermediate size, V vocabulary size,
L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fm9g.config.model import ModelConfig

LOSS_CHUNK_ROWS = 1024  # rows of logits that fm9g.model.loss computes at a time


@dataclass(frozen=True)
class Widths:
    """The shapes above on one rank: tensor parallelism divides Q, K and F."""

    c: int
    q: int
    k: int
    f: int
    v: int
    heads: int
    layers: int

    @classmethod
    def of(cls, model: ModelConfig, tp_size: int = 1) -> Widths:
        return cls(
            c=model.hidden_size,
            q=model.num_heads * model.head_dim // tp_size,
            k=model.num_kv_heads * model.head_dim // tp_size,
            f=-(-model.intermediate_size // tp_size),
            v=model.vocab_size,
            heads=model.num_heads // tp_size,
            layers=model.num_layers,
        )


def count_weights(model: ModelConfig) -> int:
    """All weights of a model."""
    return model.num_layers * layer_weights(model) + root_weights(model)


def layer_weights(model: ModelConfig, tp_size: int = 1) -> int:
    """Weights of a layer on one of tp_size ranks: matrices and biases are sharded, norms are replicated."""
    w = Widths.of(model, tp_size)
    biases = (w.q + 2 * w.k) * model.qkv_bias
    norms = 2 * w.c + 2 * model.head_dim * model.qk_norm
    return 2 * w.c * (w.q + w.k) + 3 * w.c * w.f + biases + norms


def matrix_weights(model: ModelConfig) -> tuple[int, int]:
    """Weights of all matrices of a layer, and weights of its largest matrix."""
    w = Widths.of(model)
    return 2 * w.c * (w.q + w.k) + 3 * w.c * w.f, w.c * max(w.q, w.f)


def head_weights(model: ModelConfig, tp_size: int = 1) -> int:
    """Weights of the output layer (and as many of the embedding) on one of tp_size ranks that shard the vocabulary."""
    return -(-model.vocab_size // tp_size) * model.hidden_size


def root_weights(model: ModelConfig, tp_size: int = 1) -> int:
    """Weights outside layers: embedding, last norm, and the output layer unless it is tied to the embedding."""
    return head_weights(model, tp_size) * (1 if model.tie_word_embeddings else 2) + model.hidden_size


def trained_layers(num_layers: int, trainable_layers: int) -> range:
    """The indices of the layers that are trained.

    Args:
        trainable_layers: the training key: number of the last layers; below 0: of the first ones; 0: all.
    """
    if trainable_layers < 0:
        return range(min(-trainable_layers, num_layers))
    return range(max(num_layers - trainable_layers, 0) if trainable_layers else 0, num_layers)


def adapter_weights(model: ModelConfig, layers: Collection[str], r: int) -> int:
    """Weights of the LoRA adapters of one transformer layer.

    Args:
        layers: names of linear layers, with or without the path to them.
        r: the rank.
    """
    return r * sum(map(sum, adapter_widths(model, layers)))


def adapter_widths(model: ModelConfig, layers: Collection[str]) -> list[tuple[int, int]]:
    """Input and output width of each linear layer that has an adapter."""
    w = Widths.of(model)
    widths = {
        "project_q": (w.c, w.q),
        "project_k": (w.c, w.k),
        "project_v": (w.c, w.k),
        "attention_out": (w.q, w.c),
        "w_0": (w.c, w.f),
        "w_1": (w.c, w.f),
        "w_out": (w.f, w.c),
    }
    return [widths[name] for name in {name.rpartition(".")[2] for name in layers} if name in widths]


def flops_per_token(model: ModelConfig, max_length: int, adapters: int = 0) -> float:
    """FLOPs of the forward and backward pass for a token, in documents of max_length tokens, without recomputation.

    6 for each weight that multiplies, and for causal attention half of 12 L Q max_length (Kaplan et al. 2020, section
    2.1; Chowdhery et al. 2022, appendix B, who do not halve it). An input embedding is looked up, not multiplied.

    Args:
        adapters: weights of a layer's adapters. With adapters the other weights need no gradient, which saves a third.
    """
    return training_flops(model, 1, sum_sq_seqlens(model.windows, [max_length]) / max(1, max_length), adapters)


def training_flops(model: ModelConfig, tokens: float, sq_seqlens: float, adapters: int = 0) -> float:
    """FLOPs of the forward and backward pass for documents with this many tokens in total; see flops_per_token.

    Args:
        sq_seqlens: the result of `sum_sq_seqlens` for these documents.
    """
    multiplied = model.num_layers * layer_weights(model) + head_weights(model)
    per_token = (4 if adapters else 6) * multiplied + 6 * model.num_layers * adapters
    return per_token * tokens + 6 * model.num_layers * Widths.of(model).q * sq_seqlens


def sum_sq_seqlens(windows: Collection[int], lengths: Iterable[int]) -> float:
    """Sum of the squared document lengths, as far as attention reaches, averaged over the layers.

    In a document of N tokens, a window of W tokens leaves W (2 N - W) of the square N^2.

    Args:
        windows: tokens of each layer's window; 0: unlimited.
    """
    total, counts = 0, {window: list(windows).count(window) for window in set(windows)}
    for length in lengths:
        for window, layers in counts.items():
            reach = min(length, window or length)
            total += layers * reach * (2 * length - reach)
    return total / len(windows)
