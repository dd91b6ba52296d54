"""Cross entropy of a linear output layer, without ever holding all logits.

Shapes: R rows (positions that have a target), C width of the hidden states, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fm9g.model.sizes import pad_rows

_ROWS = 1024  # logits held at a time: this many rows of V
_MULTIPLE = 128  # of which the rows are one, see pad_rows


@dataclass(frozen=True)
class Objective:
    """What is added to the cross entropy of a target y: with label smoothing e (Szegedy et al. 2016) it is that of
    (1 - e) onehot(y) + e / V; z_loss * log(Z)^2 of the softmax's denominator Z is added (Chowdhery et al. 2022)."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class _Vocabulary:
    """The token ids that this process's output weights are of: from `first` on, where a group shares them."""

    first: int = 0
    group: dist.ProcessGroup | None = None

    def total(self, values: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(values, operation, self.group)
        return values

    def normalizer(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, 1) log of the sum of the exponentials over all ids."""
        if self.group is None:
            return logits.logsumexp(dim=-1, keepdim=True)
        largest = self.total(logits.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
        return self.total((logits - largest).exp_().sum(dim=-1, keepdim=True)).log_() + largest


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
        vocabulary: _Vocabulary,
        objective: Objective,
        target_weights: torch.Tensor | None,
    ) -> Any:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        smoothing, z_loss = objective.label_smoothing, objective.z_loss
        ids = vocabulary.total(targets.new_full((), len(weight))) if smoothing else 0  # V
        extra = torch.zeros((), device=hidden.device)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            part, wanted = hidden[rows], targets[rows, None] - vocabulary.first
            here = (wanted >= 0) & (wanted < len(weight))
            wanted = wanted.where(here, 0)
            padded = pad_rows(part, _MULTIPLE)
            logits = (padded @ weight.T)[: len(part)].float()
            normalizer = vocabulary.normalizer(logits)
            at_target = vocabulary.total(logits.gather(1, wanted) * here)
            losses[rows] = (normalizer - at_target)[:, 0]
            share = None if target_weights is None else target_weights[rows, None]
            if smoothing:
                smoothed = at_target - vocabulary.total(logits.sum(1, keepdim=True)) / ids
                extra += smoothing * (smoothed if share is None else smoothed * share).sum()
            if z_loss:
                squares = normalizer.square()
                extra += z_loss * (squares if share is None else squares * share).sum()
            if not (need_hidden or need_weight):
                continue
            error = logits.sub_(normalizer).exp_()  # probabilities, less 1 at the target
            if z_loss:
                error *= 1 + 2 * z_loss * normalizer
            error.scatter_add_(1, wanted, (smoothing - 1) * here.to(error.dtype))
            if smoothing:
                error -= smoothing / ids
            if share is not None:
                error *= share
            error = pad_rows(error.to(part.dtype), _MULTIPLE)
            if grad_hidden is not None:
                grad_hidden[rows] = (error @ weight)[: len(part)]
            if grad_weight is not None:
                grad_weight += error.T @ padded
        if grad_hidden is not None:
            vocabulary.total(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses if target_weights is None else losses * target_weights).sum() + extra, losses

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
    objective: Objective = Objective(),
    target_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of softmax(hidden @ weight.T), in nats.

    hidden (R, C) and weight (V, C) of one type, targets (R,) int64. The weight may be a DTensor that is split by the
    vocabulary. target_weights: (R,) fp32, what each row counts; None: 1. Returns the sum over rows of what is to be
    minimized, and (R,) fp32 the plain cross entropy of each row, without its weight, which no gradient flows from.
    """
    vocabulary = _Vocabulary()
    if (mesh := getattr(weight, "device_mesh", None)) is not None:
        most = -(-len(weight) // mesh.size())
        vocabulary = _Vocabulary(most * mesh.get_local_rank(), mesh.get_group())
        weight = weight.to_local()  # type: ignore[attr-defined, operator]
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocabulary, objective, target_weights)  # type: ignore[no-untyped-call]
