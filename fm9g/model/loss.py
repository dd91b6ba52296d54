"""Cross entropy of a linear output layer, without ever holding all logits.

Shapes: R rows (positions that have a target), C width of the hidden states, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch

_ROWS = 1024  # logits held at a time: this many rows of V


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, chunk by chunk: memory O(V * chunk), and no logits are computed twice.

    That works because the loss is a sum: an incoming gradient is one number, which scales what was computed.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> Any:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        narrow = weight.to(dtype)
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            part, wanted = hidden[rows].to(dtype), targets[rows, None]
            logits = (part @ narrow.T).float()
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            losses[rows] = (normalizer - logits.gather(1, wanted))[:, 0]
            if not (need_hidden or need_weight):
                continue
            error = logits.sub_(normalizer).exp_()  # probabilities, less 1 at the target
            error.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=error.dtype))
            error = error.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = error @ narrow
            if grad_weight is not None:
                grad_weight += error.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of softmax(hidden @ weight.T), in nats.

    hidden (R, C), weight (V, C), targets (R,) int64. Returns the sum over rows, and (R,) fp32 the loss of each row,
    which no gradient flows from.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype)  # type: ignore[no-untyped-call]
