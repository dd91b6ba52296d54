"""Bytes of activations, optimizer state and checkpoints: they follow from fm9g/model line by line.

Shapes: T tokens of a row, C hidden size, Q and K widths of all query and of all key heads, F intermediate size, V token
ids, L layers.
"""

from __future__ import annotations

from fm9g.config.model import ModelConfig
from fm9g.model.counts import (
    LOSS_CHUNK_ROWS,
    Widths,
    adapter_widths,
    count_weights,
    head_weights,
    layer_weights,
)
from fm9g.plan.job import JobConfig


def trained_weights(model: ModelConfig, job: JobConfig) -> int:
    """Number of trained weights: those of all adapters, or of the model without adapters."""
    return job.adapters(model) * model.num_layers or count_weights(model)


def checkpoint_bytes(model: ModelConfig, job: JobConfig) -> int:
    """Size of a checkpoint on disk: trained weights, their running mean, and optimizer state, all in fp32."""
    state = 0.0 if job.save_model_only else _fp32_state_bytes(model, job)
    return round((4 + 4 * bool(job.ema_decay) + state) * trained_weights(model, job))


def state_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes of optimizer state in memory per weight, averaged over the model: moments and the mean of weights."""
    in_8_bits = 2 * (1 + 4 / 256)  # a byte each, and an fp32 scale for 256
    moments = in_8_bits if job.optimizer == "adamw8bit" else _fp32_state_bytes(model, job)
    return moments + 4 * bool(job.ema_decay)


def _fp32_state_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes of optimizer state per weight in fp32, as in checkpoints, those of adamw8bit included."""
    if job.optimizer == "adafactor":
        return 0.0  # a row and a column of each matrix
    if job.optimizer == "muon":  # one mean of a matrix in layers; adapters are such
        matrices = 1.0 if job.lora_layer else model.num_layers * layer_weights(model) / count_weights(model)
        return 4 * matrices + 8 * (1 - matrices)
    return 8.0


def norm_bytes(w: Widths, job: JobConfig) -> float:
    """Kept by an RMSNorm for a token: its input in fp32, where its weight is trained the normed value, and the
    statistic; not its output."""
    return 4 * w.c + job.width * w.c * (not job.lora_layer) + 4


def layer_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Kept by a layer for its backward pass, for a row, on one rank.

    Attention: the output of the norm, rotated queries and keys, values, the output (once more where torch joins those
    of documents), and a statistic a head. Feed-forward: the output of the norm, the gate before and after its
    activation, the other factor, and the product. Rotation keeps its shared angles alone, residual additions nothing.
    What is there for a matrix's own gradient alone is kept where the matrix is trained, or has an adapter: the outputs
    of the norms, the joined output of attention, and the product.
    """
    w, e = Widths.of(model, job.tp_size), job.width
    norm, out = norm_bytes(w, job), float(e * w.c)
    if job.split_tokens > 1:
        norm, out = norm / job.split_tokens, out + out / job.split_tokens  # its share, and whole for the matrices
    outs = out * (job.trains("project_q", "project_k", "project_v") + job.trains("w_0", "w_1"))
    joined = e * w.q * (not job.flash and job.trains("attention_out"))
    attention = e * (2 * w.q + 2 * w.k) + joined + 4 * w.heads
    if model.qk_norm:  # inputs in fp32, and the normed values
        attention += (4 + e) * (w.q + w.k)
    dropout = 2 * w.c * (model.dropout > 0)
    return job.row * (2 * norm + outs + attention + e * w.f * (3 + job.trains("w_out")) + dropout)


def input_bytes(model: ModelConfig, job: JobConfig) -> float:
    """A layer's input, which is all that full checkpointing keeps of it."""
    return job.row * job.width * model.hidden_size / job.split_tokens


def selective_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Kept of a layer by selective checkpointing: its input, and what attention and matrices give, those of adapters
    among them."""
    w, e = Widths.of(model, job.tp_size), job.width
    adapters = sum(job.lora_r + out for _, out in adapter_widths(model, job.lora_layer))
    kept = e * adapters + e * (w.q + 2 * w.k) + e * w.q + 4 * w.heads + 2 * e * w.f + 2 * e * w.c
    return job.row * kept + input_bytes(model, job)


def feed_forward_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Above layer_bytes at the fullest moment of a layer's backward pass, which is that of the gate's product.

    Then the product, where it was kept, has gone, and the gradients of product, gate and factor are there.
    """
    w, e = Widths.of(model, job.tp_size), job.width
    return job.row * e * w.f * (3 - job.trains("w_out"))


def norm_backward_bytes(model: ModelConfig, job: JobConfig) -> float:
    """At the end of a layer's backward pass: what its first norm kept, and four gradients in fp32."""
    w, e = Widths.of(model, job.tp_size), job.width
    return job.row * (norm_bytes(w, job) + 16 * w.c + 2 * e * w.c) / job.split_tokens


def shared_bytes(model: ModelConfig, job: JobConfig) -> float:
    """There once for a row, all the time: ids, positions and targets, losses, angles of the rotation."""
    return job.row * (40 + 8 * model.head_dim)


def end_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Between the last layer and the loss: what the last norm keeps, its output, and the gradient of that."""
    w, e = Widths.of(model), job.width
    return job.row * (norm_bytes(w, job) / job.split_tokens + 2 * e * w.c)


def loss_bytes(model: ModelConfig, job: JobConfig) -> tuple[float, float]:
    """In fm9g/model/loss.py: at its fullest chunk, and in the backward pass, when the weights' gradient is scaled.

    A chunk: logits in fp32, those of the chunk before with their copy in the computation's precision, and either the
    logits as the matrix gives them or the differences that logsumexp takes; or its part of the weights' gradient. With
    adapters the weights have none.
    """
    ids, e, weight = -(-model.vocab_size // job.tp_size), job.width, head_weights(model, job.tp_size)
    first, second = min(LOSS_CHUNK_ROWS, job.row), min(LOSS_CHUNK_ROWS, max(0, job.row - LOSS_CHUNK_ROWS))
    copy = e * (e < 4)
    logits = ids * max(8 * first, (4 + copy) * first + (6 if copy else 8) * second)
    if job.lora_layer:
        return logits, 0.0
    product = ids * (4 + copy) * first + e * weight
    return 4 * weight + max(logits, product), (8 + copy) * weight
