"""Cross entropy of a linear output layer, without the logits of all rows in memory at once.

    hidden_RC ─┬─ rows 0..1023    ── @ weight_VC.T ──> logits_NV ──> losses_N, grad_hidden_NC, += grad_weight_VC
               ├─ rows 1024..2047 ── ...               (the memory of the chunk before is free again)
               └─ ...

Shape suffixes: R rows, the positions that have a target; N rows of one chunk; C hidden size; V token ids, of which the
output weight has one row each.
"""

# ruff: noqa: N803, N806 (shape suffixes)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fm9g.model.counts import LOSS_CHUNK_ROWS
from fm9g.model.padding import pad_rows


@dataclass(frozen=True)
class LossConfig:
    """What is added to the cross entropy of a target.

    Args:
        label_smoothing: e, for a cross entropy with (1 - e) onehot(target) + e / V (Szegedy et al. 2016).
        z_loss: factor of log(Z)^2, Z the denominator of the softmax (Chowdhery et al. 2022).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


class VocabShard:
    """The part of the vocabulary whose output weights this process computes with: all of it.

    An engine that splits the output weight by token ids gives the model a subclass.
    """

    def local_rows(self, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows of the output weight on this process, and the token id of the first one."""
        return weight, 0

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces the values by their sum over all parts of the vocabulary."""
        return values

    def logsumexp(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """(N, 1) the log of the sum of exponentials over all token ids."""
        return logits_NV.logsumexp(dim=-1, keepdim=True)


def linear_cross_entropy(
    hidden_RC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_R: torch.Tensor,
    loss_config: LossConfig = LossConfig(),
    target_weights_R: torch.Tensor | None = None,
    vocab_shard: VocabShard | None = None,
    *,
    chunk_rows: int = LOSS_CHUNK_ROWS,
    row_multiple: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of softmax(hidden_RC @ weight_VC.T), in nats.

    Args:
        hidden_RC, weight_VC: of one dtype.
        targets_R: int64 token ids.
        target_weights_R: fp32 factor of each row in the loss; None: 1.
        vocab_shard: which rows of the weight this process has; None: all.
        chunk_rows: rows of logits in memory at a time.
        row_multiple: multiple to which the rows of matrix products are padded, see `pad_rows`.

    Returns:
        The sum over rows of the quantity to minimize; and (R,) fp32 the plain cross entropy of each row, unweighted
        and without gradient.
    """
    vocab_shard = vocab_shard or VocabShard()
    weight_VC, first_id = vocab_shard.local_rows(weight_VC)
    result: tuple[torch.Tensor, torch.Tensor] = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_RC, weight_VC, targets_R - first_id, vocab_shard, loss_config, target_weights_R, chunk_rows, row_multiple
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, so that no logits are stored or computed twice.

    This works because the loss is a sum: the incoming gradient is one number, by which `backward` multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RC: torch.Tensor,
        weight_VC: torch.Tensor,
        targets_R: torch.Tensor,
        vocab_shard: VocabShard,
        loss_config: LossConfig,
        target_weights_R: torch.Tensor | None,
        chunk_rows: int,
        row_multiple: int,
    ) -> Any:
        """targets_R: row numbers of the weight, out of range for targets in other parts of the vocabulary."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        smoothing, z_loss = loss_config.label_smoothing, loss_config.z_loss
        vocab_size = vocab_shard.all_reduce_sum(targets_R.new_full((), len(weight_VC))) if smoothing else 0
        extra_loss = torch.zeros((), device=hidden_RC.device)
        losses_R = torch.empty(len(targets_R), dtype=torch.float32, device=hidden_RC.device)
        grad_hidden_RC = torch.empty_like(hidden_RC) if need_hidden else None
        grad_weight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if need_weight else None
        for start in range(0, len(targets_R), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_NC, targets_N1 = hidden_RC[rows], targets_R[rows, None]
            in_shard_N1 = (targets_N1 >= 0) & (targets_N1 < len(weight_VC))
            targets_N1 = targets_N1.where(in_shard_N1, 0)
            padded_NC = pad_rows(hidden_NC, row_multiple)
            logits_NV = (padded_NC @ weight_VC.T)[: len(hidden_NC)].float()
            logsumexp_N1 = vocab_shard.logsumexp(logits_NV)
            target_logits_N1 = vocab_shard.all_reduce_sum(logits_NV.gather(1, targets_N1) * in_shard_N1)
            losses_R[rows] = (logsumexp_N1 - target_logits_N1)[:, 0]
            weights_N1 = None if target_weights_R is None else target_weights_R[rows, None]
            if smoothing:
                mean_logits_N1 = vocab_shard.all_reduce_sum(logits_NV.sum(1, keepdim=True)) / vocab_size
                extra_loss += smoothing * _weighted(target_logits_N1 - mean_logits_N1, weights_N1).sum()
            if z_loss:
                extra_loss += z_loss * _weighted(logsumexp_N1.square(), weights_N1).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits_NV = logits_NV.sub_(logsumexp_N1).exp_()  # probabilities, less 1 at the target
            if z_loss:
                grad_logits_NV *= 1 + 2 * z_loss * logsumexp_N1
            grad_logits_NV.scatter_add_(1, targets_N1, (smoothing - 1) * in_shard_N1.to(grad_logits_NV.dtype))
            if smoothing:
                grad_logits_NV -= smoothing / vocab_size
            if weights_N1 is not None:
                grad_logits_NV *= weights_N1
            grad_logits_NV = pad_rows(grad_logits_NV.to(hidden_NC.dtype), row_multiple)
            if grad_hidden_RC is not None:
                grad_hidden_RC[rows] = (grad_logits_NV @ weight_VC)[: len(hidden_NC)]
            if grad_weight_VC is not None:
                grad_weight_VC += grad_logits_NV.T @ padded_NC
        if grad_hidden_RC is not None:
            vocab_shard.all_reduce_sum(grad_hidden_RC)
        ctx.save_for_backward(grad_hidden_RC, grad_weight_VC)
        ctx.weight_dtype = weight_VC.dtype
        ctx.mark_non_differentiable(losses_R)
        return _weighted(losses_R, target_weights_R).sum() + extra_loss, losses_R

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:
        grad_hidden_RC, grad_weight_VC = ctx.saved_tensors
        return (
            None if grad_hidden_RC is None else grad_hidden_RC * grad.to(grad_hidden_RC.dtype),
            None if grad_weight_VC is None else (grad_weight_VC * grad).to(ctx.weight_dtype),
            *(None,) * 6,
        )


def _weighted(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return values if weights is None else values * weights
