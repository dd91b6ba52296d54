"""Bytes of activations, optimizer state and checkpoints, derived line by line from the code in fm9g/model.

Widths on one rank of tensor parallelism: c hidden size, q all query heads, k all key heads, f intermediate size.
e: bytes of a number in compute precision.
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
    root_weights,
)
from fm9g.plan.job import JobConfig


def checkpoint_bytes(model: ModelConfig, job: JobConfig) -> int:
    """Size of a checkpoint on disk, all in fp32: weights and their running mean, of the adapters or else of the model,
    and the optimizer state of those that are trained."""
    trained = saved = job.adapters(model) * model.num_layers + job.saved_modules(model)
    if not job.lora_layer:
        saved = count_weights(model)
        trained = len(job.trained_layers(model)) * layer_weights(model) + root_weights(model) * job.trains_root
    state = 0.0 if job.save_model_only else _fp32_state_bytes(model, job)
    return round((4 + 4 * bool(job.ema_decay)) * saved + state * trained)


def state_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes of optimizer state in memory per weight, averaged over the model: moments and the mean of weights."""
    in_8_bits = 2 * (1 + 4 / 256)  # two moments of a byte each, and an fp32 scale per 256 values
    moments = in_8_bits if job.optimizer == "adamw8bit" else _fp32_state_bytes(model, job)
    return moments + 4 * bool(job.ema_decay)


def _fp32_state_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes of optimizer state per weight in fp32. Checkpoints store it so, also for adamw8bit."""
    if job.optimizer == "adafactor":
        return 0.0  # a row and a column per matrix: negligible
    if job.optimizer == "sgd":
        return 4.0 * bool(job.sgd_momentum)
    if job.optimizer == "muon":  # one moment for the matrices of layers, adapters included; two for other weights
        matrices = model.num_layers * layer_weights(model) / count_weights(model) if job.trains_root else 1.0
        return 4 * matrices + 8 * (1 - matrices)
    return 8.0


def norm_bytes(w: Widths, job: JobConfig, frozen: bool = False) -> float:
    """Bytes per token that an RMSNorm saves: its input in fp32, the statistic, and the normed value if its weight is
    trained. The consumers of its output save that."""
    return 4 * w.c + job.width * w.c * (not job.lora_layer and not frozen) + 4


def layer_bytes(model: ModelConfig, job: JobConfig, frozen: bool = False) -> float:
    """Bytes that a layer saves for its backward pass, for one row on one rank.

    Attention saves the output of the norm, rotated queries and keys, values, its output (twice if torch concatenates
    the outputs of documents), and a statistic per head. Feed-forward saves the output of the norm, the gate before and
    after its activation, the up projection, and their product. Rotation saves only its shared angles, residual
    additions nothing. Tensors that only the gradient of a matrix needs are saved if the matrix is trained or has an
    adapter: the outputs of the norms, the concatenated output of attention, and the product.

    Args:
        frozen: the layer is not trained, and passes gradients to a layer below that is.
    """

    def trains(*names: str) -> bool:
        return not frozen and job.trains(*names)

    w, e = Widths.of(model, job.tp_size), job.width
    norm, out = norm_bytes(w, job, frozen), float(e * w.c)
    if job.split_tokens > 1:
        norm, out = (
            norm / job.split_tokens,
            out + out / job.split_tokens,
        )  # a shard; the output also gathered
    outs = out * (trains("project_q", "project_k", "project_v") + trains("w_0", "w_1"))
    joined = e * w.q * (not job.flash and trains("attention_out"))
    attention = e * (2 * w.q + 2 * w.k) + joined + 4 * w.heads
    if model.qk_norm:  # inputs in fp32, and the normed values
        attention += (4 + e) * (w.q + w.k)
    dropout = 2 * w.c * (model.dropout > 0)
    return job.row * (2 * norm + outs + attention + e * w.f * (3 + trains("w_out")) + dropout)


def input_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes of a layer's input, the only tensor that full checkpointing saves."""
    return job.row * job.width * model.hidden_size / job.split_tokens


def selective_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes per layer that selective checkpointing saves: its input and the outputs of attention and of all matrices,
    adapters included."""
    w, e = Widths.of(model, job.tp_size), job.width
    adapters = sum(job.lora_r + out for _, out in adapter_widths(model, job.lora_layer))
    bytes_per_token = e * adapters + e * (w.q + 2 * w.k) + e * w.q + 4 * w.heads + 2 * e * w.f + 2 * e * w.c
    return job.row * bytes_per_token + input_bytes(model, job)


def feed_forward_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes beyond layer_bytes at the peak of a layer's backward pass: that of the product of gate and up projection.

    The gradients of product, gate and up projection are in memory then; a saved product is already freed.
    """
    w, e = Widths.of(model, job.tp_size), job.width
    return job.row * e * w.f * (3 - job.trains("w_out"))


def norm_backward_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes at the end of a layer's backward pass: the tensors saved by its first norm, four gradients in fp32, and two
    in compute precision."""
    w, e = Widths.of(model, job.tp_size), job.width
    return job.row * (norm_bytes(w, job) + 16 * w.c + 2 * e * w.c) / job.split_tokens


def shared_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes per row that stay through the step: ids, positions, targets, losses, angles of the rotation."""
    return job.row * (40 + 8 * model.head_dim)


def end_bytes(model: ModelConfig, job: JobConfig) -> float:
    """Bytes between the last layer and the loss: the last norm's saved tensors, its output, and that one's gradient."""
    w, e = Widths.of(model), job.width
    return job.row * (norm_bytes(w, job) / job.split_tokens + 2 * e * w.c)


def loss_bytes(model: ModelConfig, job: JobConfig) -> tuple[float, float]:
    """Bytes of fm9g/model/loss.py: at the largest chunk, and in the backward pass, as it scales the weights' gradient.

    A chunk has its logits in fp32, those of the previous chunk with their copy in compute precision, and either the
    matrix's output or the differences that logsumexp computes; or else its part of the weights' gradient. A frozen
    output layer has no gradient.
    """
    ids, e, weight = -(-model.vocab_size // job.tp_size), job.width, head_weights(model, job.tp_size)
    first, second = min(LOSS_CHUNK_ROWS, job.row), min(LOSS_CHUNK_ROWS, max(0, job.row - LOSS_CHUNK_ROWS))
    copy = e * (e < 4)
    logits = ids * max(8 * first, (4 + copy) * first + (6 if copy else 8) * second)
    if not job.trains_root:
        return logits, 0.0
    product = ids * (4 + copy) * first + e * weight
    return 4 * weight + max(logits, product), (8 + copy) * weight
