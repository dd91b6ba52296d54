"""What a layer weighs, computes and keeps: counts that follow from fm9g/model line by line.

Shapes: T tokens of a row, C hidden size, Q and K widths of all query and of all key heads, F intermediate size, V token
ids, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fm9g.config.model import ModelConfig
from fm9g.plan.job import JobConfig

LOSS_ROWS = 1024  # of logits at a time, in fm9g/model/loss.py


@dataclass(frozen=True)
class Widths:
    """The shapes above, of one rank: with tensor parallelism Q, K and F are its share."""

    c: int
    q: int
    k: int
    f: int
    v: int
    heads: int
    layers: int

    @classmethod
    def of(cls, model: ModelConfig, ways: int = 1) -> Widths:
        return cls(
            c=model.hidden_size,
            q=model.num_heads * model.head_dim // ways,
            k=model.num_kv_heads * model.head_dim // ways,
            f=-(-model.intermediate_size // ways),
            v=model.vocab_size,
            heads=model.num_heads // ways,
            layers=model.num_layers,
        )


def layer_weights(model: ModelConfig, ways: int = 1) -> int:
    """Weights of a layer on one of `ways` ranks of tensor parallelism: matrices and biases dealt out, norms whole."""
    w = Widths.of(model, ways)
    biases = (w.q + 2 * w.k) * model.qkv_bias
    norms = 2 * w.c + 2 * model.head_dim * model.qk_norm
    return 2 * w.c * (w.q + w.k) + 3 * w.c * w.f + biases + norms


def adapter_weights(model: ModelConfig, names: Collection[str], r: int) -> int:
    """Weights of a layer's LoRA adapters of rank r. names: of linear layers, dotted or not."""
    return r * sum(map(sum, _adapter_widths(model, names)))


def _adapter_widths(model: ModelConfig, names: Collection[str]) -> list[tuple[int, int]]:
    """What the adapters of a layer take and give for a token."""
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
    return [widths[name] for name in {name.rpartition(".")[2] for name in names} if name in widths]


def matrix_weights(model: ModelConfig) -> tuple[int, int]:
    """Weights of a layer's matrices, and of the largest of them."""
    w = Widths.of(model)
    return 2 * w.c * (w.q + w.k) + 3 * w.c * w.f, w.c * max(w.q, w.f)


def head_weights(model: ModelConfig, ways: int = 1) -> int:
    """Weights of the output layer, and of the embedding, on one of `ways` ranks that share the vocabulary."""
    return -(-model.vocab_size // ways) * model.hidden_size


def root_weights(model: ModelConfig, ways: int = 1) -> int:
    """Weights outside layers: embedding, last norm, and the output layer where it has its own."""
    return head_weights(model, ways) * (1 if model.tie_word_embeddings else 2) + model.hidden_size


def count_weights(model: ModelConfig) -> int:
    """All weights of a model."""
    return model.num_layers * layer_weights(model) + root_weights(model)


def trained_weights(model: ModelConfig, job: JobConfig) -> int:
    """The weights of all adapters, or of the model where there are none."""
    return job.adapters(model) * model.num_layers or count_weights(model)


def checkpoint_bytes(model: ModelConfig, job: JobConfig) -> int:
    """Of a checkpoint on disk: the trained weights, their running mean, and the optimizer's state, all in fp32."""
    state = 0.0 if job.save_model_only else _fp32_state_bytes(model, job)
    return round((4 + 4 * bool(job.ema_decay) + state) * trained_weights(model, job))


def state_bytes(model: ModelConfig, job: JobConfig) -> float:
    """What the optimizer keeps in memory for a weight, on average over the model: moments, and the mean of weights."""
    in_8_bits = 2 * (1 + 4 / 256)  # a byte each, and an fp32 scale for 256
    moments = in_8_bits if job.optimizer == "adamw8bit" else _fp32_state_bytes(model, job)
    return moments + 4 * bool(job.ema_decay)


def _fp32_state_bytes(model: ModelConfig, job: JobConfig) -> float:
    """The optimizer's state for a weight, on average, in fp32: in checkpoints all of them are, adamw8bit too."""
    if job.optimizer == "adafactor":
        return 0.0  # a row and a column of each matrix
    if job.optimizer == "muon":  # one mean of a matrix in layers; adapters are such
        matrices = 1.0 if job.lora_layer else model.num_layers * layer_weights(model) / count_weights(model)
        return 4 * matrices + 8 * (1 - matrices)
    return 8.0


def flops_per_token(model: ModelConfig, max_length: int, adapters: int = 0) -> float:
    """Of forward and backward, for documents of max_length tokens; what is recomputed is not counted.

    6 for each weight that multiplies, and for causal attention half of 12 L Q max_length (Kaplan et al. 2020, section
    2.1; Chowdhery et al. 2022, appendix B, who do not halve it). An input embedding is looked up and not multiplied.
    adapters: weights of a layer's; then no gradients of other weights are computed, which are a third.
    """
    return flops_of(model, 1, attended(model.windows, [max_length]) / max(1, max_length), adapters)


def attended(windows: Collection[int], lengths: Iterable[int]) -> float:
    """The squared lengths of documents, added up, in the mean over layers; windows: of the layers, 0 for none.

    Of a document of L tokens a window of W leaves W (2 L - W) of the square.
    """
    total, counts = 0, {window: list(windows).count(window) for window in set(windows)}
    for length in lengths:
        for window, layers in counts.items():
            reach = min(length, window or length)
            total += layers * reach * (2 * length - reach)
    return total / len(windows)


def flops_of(model: ModelConfig, tokens: float, squares: float, adapters: int = 0) -> float:
    """As flops_per_token, of documents with so many tokens in all. squares: of their lengths, as `attended` adds up."""
    multiplied = model.num_layers * layer_weights(model) + head_weights(model)
    each = (4 if adapters else 6) * multiplied + 6 * model.num_layers * adapters
    return each * tokens + 6 * model.num_layers * Widths.of(model).q * squares


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
    adapters = sum(job.lora_r + out for _, out in _adapter_widths(model, job.lora_layer))
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
    first, second = min(LOSS_ROWS, job.row), min(LOSS_ROWS, max(0, job.row - LOSS_ROWS))
    copy = e * (e < 4)
    logits = ids * max(8 * first, (4 + copy) * first + (6 if copy else 8) * second)
    if job.lora_layer:
        return logits, 0.0
    product = ids * (4 + copy) * first + e * weight
    return 4 * weight + max(logits, product), (8 + copy) * weight
