"""The 9G transformer in plain torch, without knowledge of engines, ranks or files.

Modules carry the names of 9G checkpoints: a state dict of this model is the content of a 9G .pt file, and users name
layers for adapters by these names.

    input_embedding
    encoder.layers.N.self_att.layernorm_before_attention
                             .self_attention.{project_q, project_k, project_v, attention_out}
                    .ffn.layernorm_before_ffn
                        .ffn.{w_in.w_0, w_in.w_1, w_out}
    encoder.output_layernorm
    lm_head                                                     (absent if its weight is input_embedding's)

Shapes: T tokens of a packed row, R positions that have a target, C hidden size, H and K query and key heads, D width of
a head, F intermediate size, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fm9g.config.model import ModelConfig
from fm9g.model.attention import varlen_attention
from fm9g.model.loss import LossConfig, VocabShard, linear_cross_entropy
from fm9g.model.rotary import apply_rotary_emb, rotary_cos_sin
from fm9g.model.seeding import weight_generator


@dataclass(frozen=True)
class Batch:
    """One packed row on the model's device; seqlens alone is on the host.

    Args:
        input_ids: (T,).
        positions: (T,) of each token in its document.
        cu_seqlens: (documents + 1,) int32 borders of the documents.
        seqlens: lengths of the same documents.
        target_positions: (R,) the positions that have a target.
        targets: (R,) int64, the token after each of them.
        target_weights: (R,) fp32 factor of each target in the loss; None: 1.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: list[int]
    target_positions: torch.Tensor
    targets: torch.Tensor
    target_weights: torch.Tensor | None = None


class RMSNorm(nn.Module):
    """Root mean square normalization (Zhang, Sennrich 2019): statistics in fp32, cast back, multiplied by weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_fp32 = x.float()
        return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and norms of queries and keys if the model has them."""

    def __init__(self, config: ModelConfig, window: int) -> None:
        """window: number of tokens that a token attends to, itself included; 0: all before it."""
        super().__init__()
        self.head_dim, self.flash, self.scale = config.head_dim, config.use_flash_attn, config.attention_scale or None
        self.window = window
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.project_q = nn.Linear(config.hidden_size, q_dim, bias=config.qkv_bias)
        self.project_k = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.project_v = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.attention_out = nn.Linear(q_dim, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor, seqlens: list[int]
    ) -> torch.Tensor:
        query = self.project_q(x).unflatten(-1, (-1, self.head_dim))  # (T, H, D)
        key = self.project_k(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary_emb(query, cos, sin), apply_rotary_emb(key, cos, sin)
        value = self.project_v(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        attn_out = varlen_attention(query, key, value, cu_seqlens, seqlens, self.flash, self.scale, self.window)
        output: torch.Tensor = self.attention_out(attn_out.flatten(-2))  # (T, C)
        return output


class GatedLinear(nn.Module):
    """act(w_0 x) * (w_1 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_0 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w_1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.activation = F.silu if config.activation == "silu" else F.gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self.activation(self.w_0(x)) * self.w_1(x)  # (T, F)
        return gated


class FeedForward(nn.Module):
    """Gated feed-forward layer (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_in = GatedLinear(config)
        self.w_out = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.w_out(self.w_in(x))  # (T, C)
        return output


class AttentionBlock(nn.Module):
    def __init__(self, config: ModelConfig, window: int) -> None:
        super().__init__()
        self.layernorm_before_attention = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attention = Attention(config, window)


class FeedForwardBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layernorm_before_ffn = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = FeedForward(config)


class TransformerBlock(nn.Module):
    """One pre-norm transformer layer: two residual branches."""

    def __init__(self, config: ModelConfig, window: int) -> None:
        super().__init__()
        self.self_att = AttentionBlock(config, window)
        self.ffn = FeedForwardBlock(config)
        self.residual_multiplier, self.dropout = config.residual_multiplier, config.dropout

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cu_seqlens: torch.Tensor, seqlens: list[int]
    ) -> torch.Tensor:
        normed = self.self_att.layernorm_before_attention(x)
        x = self._add(x, self.self_att.self_attention(normed, cos, sin, cu_seqlens, seqlens))
        return self._add(x, self.ffn.ffn(self.ffn.layernorm_before_ffn(x)))

    def _add(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(branch, self.dropout, self.training) * self.residual_multiplier


class TransformerStack(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerBlock(config, window) for window in config.windows)
        self.output_layernorm = RMSNorm(config.hidden_size, config.norm_eps)


class FM9G(nn.Module):
    """A 9G language model. Build it under torch.device("meta") and let an engine fill it, or call init_weight."""

    def __init__(self, config: ModelConfig, loss_config: LossConfig | None = None, neftune_alpha: float = 0.0) -> None:
        """
        Args:
            loss_config: terms beside cross entropy; None: none.
            neftune_alpha: size of the noise on embeddings in training, see `neftune_noise`; 0: none.
        """
        super().__init__()
        self.config, self._loss_config, self._neftune_alpha = config, loss_config or LossConfig(), neftune_alpha
        self.vocab_shard = VocabShard()  # an engine that splits the output weight puts its own here
        self.input_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = TransformerStack(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a packed row: its sum over targets, in nats; and (R,) that of each target, without gradient."""
        hidden = self.hidden_states(batch)[batch.target_positions]  # (R, C)
        return linear_cross_entropy(
            hidden, self.output_weight, batch.targets, self._loss_config, batch.target_weights, self.vocab_shard
        )

    def logits(self, batch: Batch) -> torch.Tensor:
        """(T, V) scores of the token after each position."""
        return F.linear(self.hidden_states(batch), self.output_weight)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """(T, C) the inputs of the output layer."""
        cos, sin = rotary_cos_sin(self.config, batch.positions, batch.cu_seqlens)
        x = self.input_embedding(batch.input_ids) * self.config.embedding_multiplier
        if self._neftune_alpha and self.training:
            x = x + neftune_noise(x, batch.cu_seqlens, self._neftune_alpha)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, batch.cu_seqlens, batch.seqlens)
        hidden: torch.Tensor = self.encoder.output_layernorm(x) / self.config.mup_width
        return hidden

    @property
    def output_weight(self) -> torch.Tensor:
        """(V, C)."""
        return (self.input_embedding if self.config.tie_word_embeddings else self.lm_head).weight

    @torch.no_grad()
    def init_weight(self, name: str, weight: torch.Tensor, seed: int) -> None:
        """Fills a weight with its initial values, which depend on its name and the seed alone.

        Linear layers: normal with init_std / sqrt(mup_width); embedding and output: normal with init_std.
        """
        if name.endswith(".bias"):
            weight.zero_()
        elif weight.dim() == 1:
            weight.fill_(1.0)
        else:
            std = self.config.init_std / (self.config.mup_width**0.5 if is_mup_scaled(name) else 1.0)
            weight.normal_(0.0, std, generator=weight_generator(name, seed, weight.device))


def neftune_noise(x: torch.Tensor, cu_seqlens: torch.Tensor, alpha: float) -> torch.Tensor:
    """(T, C) uniform noise in +-alpha / sqrt(length of the document * C): NEFTune (Jain et al. 2023).

    Args:
        x: (T, C) embeddings, for shape and dtype.
        cu_seqlens: (documents + 1,) borders of the documents.
    """
    seqlens = cu_seqlens.diff()
    bounds = alpha / (seqlens * x.shape[-1]).sqrt()
    bound = bounds.repeat_interleave(seqlens, output_size=len(x))[:, None]  # (T, 1)
    return ((torch.rand_like(x, dtype=torch.float32) * 2 - 1) * bound).to(x.dtype)


def is_mup_scaled(name: str) -> bool:
    """Whether a weight is that of a linear layer, whose learning rate muP divides by mup_width."""
    return name.startswith("encoder.layers.") and name.endswith(".weight") and "norm" not in name


def is_norm_or_bias(name: str) -> bool:
    """Whether a weight is that of a norm, or a bias. The magnitudes of DoRA are neither."""
    return name.endswith(".bias") or "norm" in name


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The names and shapes of a model's weights."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in FM9G(config).named_parameters()}
