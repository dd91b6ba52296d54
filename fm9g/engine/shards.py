"""The part of each weight that this process holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fm9g.engine.gather import GatherSpec


@dataclass(frozen=True)
class ShardInfo:
    """This process's part of a weight.

    Args:
        shape: of the full weight.
        local_view: the view of a full tensor that is this part.
        num_replicas: processes that hold the same part.
        is_primary: whether this process is the one of them whose part is exported.
        trainable: whether the weight is trained.
        tensor: returns the part itself.
        grad: returns its gradient; None if there is none.
    """

    shape: torch.Size
    local_view: Callable[[torch.Tensor], torch.Tensor]
    num_replicas: int
    is_primary: bool
    trainable: bool
    tensor: Callable[[], torch.Tensor]
    grad: Callable[[], torch.Tensor | None]

    def gather_spec(self, local: torch.Tensor | None = None) -> GatherSpec:
        """This part for `GatheredStateDict`. local: values that replace those of `tensor`, such as fp32 masters."""
        return GatherSpec(self.shape, self.local_view, self.is_primary, self.tensor if local is None else lambda: local)
