"""Cross entropy of a linear output layer, without ever holding all logits.

Shapes: R rows (positions that have a target), C width of the hidden states, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fm9g.model.padding import pad_rows

_CHUNK_ROWS = 1024  # logits held at a time: this many rows of V
_ROW_MULTIPLE = 128  # of which the rows are one, see pad_rows


@dataclass(frozen=True)
class LossConfig:
    """What is added to the cross entropy of a target y: with label smoothing e (Szegedy et al. 2016) it is that of
    (1 - e) onehot(y) + e / V; z_loss * log(Z)^2 of the softmax's denominator Z is added (Chowdhery et al. 2022)."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class _VocabShard:
    """The token ids that this process's output weights are of: from `start_index` on, where a group shares them."""

    start_index: int = 0
    group: dist.ProcessGroup | None = None

    def all_reduce(self, values: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(values, op, self.group)
        return values

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, 1) log of the sum of the exponentials over all ids."""
        if self.group is None:
            return logits.logsumexp(dim=-1, keepdim=True)
        max_logits = self.all_reduce(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
        return self.all_reduce((logits - max_logits).exp_().sum(dim=-1, keepdim=True)).log_() + max_logits


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, chunk by chunk: memory O(V * chunk), and no logits are computed twice.

    That works because the loss is a sum: an incoming gradient is one number, which scales what was computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocab_shard: _VocabShard,
        loss_config: LossConfig,
        target_weights: torch.Tensor | None,
    ) -> Any:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        smoothing, z_loss = loss_config.label_smoothing, loss_config.z_loss
        vocab_size = vocab_shard.all_reduce(targets.new_full((), len(weight))) if smoothing else 0  # V
        extra_loss = torch.zeros((), device=hidden.device)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(targets), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            chunk, local_targets = hidden[rows], targets[rows, None] - vocab_shard.start_index
            in_shard = (local_targets >= 0) & (local_targets < len(weight))
            local_targets = local_targets.where(in_shard, 0)
            padded = pad_rows(chunk, _ROW_MULTIPLE)
            logits = (padded @ weight.T)[: len(chunk)].float()
            logsumexp = vocab_shard.logsumexp(logits)
            target_logits = vocab_shard.all_reduce(logits.gather(1, local_targets) * in_shard)
            losses[rows] = (logsumexp - target_logits)[:, 0]
            row_weights = None if target_weights is None else target_weights[rows, None]
            if smoothing:
                smoothed = target_logits - vocab_shard.all_reduce(logits.sum(1, keepdim=True)) / vocab_size
                extra_loss += smoothing * (smoothed if row_weights is None else smoothed * row_weights).sum()
            if z_loss:
                squares = logsumexp.square()
                extra_loss += z_loss * (squares if row_weights is None else squares * row_weights).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits = logits.sub_(logsumexp).exp_()  # probabilities, less 1 at the target
            if z_loss:
                grad_logits *= 1 + 2 * z_loss * logsumexp
            grad_logits.scatter_add_(1, local_targets, (smoothing - 1) * in_shard.to(grad_logits.dtype))
            if smoothing:
                grad_logits -= smoothing / vocab_size
            if row_weights is not None:
                grad_logits *= row_weights
            grad_logits = pad_rows(grad_logits.to(chunk.dtype), _ROW_MULTIPLE)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ weight)[: len(chunk)]
            if grad_weight is not None:
                grad_weight += grad_logits.T @ padded
        if grad_hidden is not None:
            vocab_shard.all_reduce(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses if target_weights is None else losses * target_weights).sum() + extra_loss, losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    loss_config: LossConfig = LossConfig(),
    target_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of softmax(hidden @ weight.T), in nats.

    hidden (R, C) and weight (V, C) of one type, targets (R,) int64. The weight may be a DTensor that is split by the
    vocabulary. target_weights: (R,) fp32, what each row counts; None: 1. Returns the sum over rows of what is to be
    minimized, and (R,) fp32 the plain cross entropy of each row, without its weight, which no gradient flows from.
    """
    vocab_shard = _VocabShard()
    if (mesh := getattr(weight, "device_mesh", None)) is not None:
        shard_size = -(-len(weight) // mesh.size())
        vocab_shard = _VocabShard(shard_size * mesh.get_local_rank(), mesh.get_group())
        weight = weight.to_local()  # type: ignore[attr-defined, operator]
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_shard, loss_config, target_weights)  # type: ignore[no-untyped-call]
