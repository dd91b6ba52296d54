"""Collective operations on tensors of the processes' devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist

from fm9g.engine.shards import ShardInfo


class Collectives(ABC):
    """All processes must call the same operations in the same order. Subclasses send by the library of their engine."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device

    @abstractmethod
    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces the values by their elementwise sum over all processes, and returns them."""

    @abstractmethod
    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Replaces the values by those of rank 0, and returns them."""

    def broadcast_from_rank0(
        self, shape: torch.Size, content: torch.Tensor | Callable[[torch.Tensor], None] | None
    ) -> torch.Tensor:
        """A full fp32 tensor on the device of every process.

        Args:
            content: on rank 0, its values, or a function that writes them into a tensor; on others it is ignored.
        """
        full = torch.empty(shape, device=self._device)
        if self._rank == 0:
            assert content is not None
            content(full) if callable(content) else full.copy_(content)
        return self.broadcast(full)

    def all_gather_full(self, shard: ShardInfo, local: torch.Tensor) -> torch.Tensor:
        """The full fp32 tensor on the device of every process.

        Args:
            shard: which part of it this process has.
            local: the values of that part.
        """
        full = torch.zeros(shard.shape, device=self._device)
        if shard.is_primary:
            shard.local_view(full).copy_(local)
        return self.all_reduce_sum(full)


class TorchCollectives(Collectives):
    """By the default process group of torch.distributed."""

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        dist.broadcast(values, 0)
        return values
