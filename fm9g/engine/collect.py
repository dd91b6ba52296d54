"""Whole tensors from the parts of all processes, on the host of rank 0, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Held:
    """What this process holds of a tensor. shape: of the whole. region: the view of a whole tensor that is the part.
    owner: this process, of those that hold the same part, speaks for it. tensor: the part now."""

    shape: torch.Size
    region: Callable[[torch.Tensor], torch.Tensor]
    owner: bool
    tensor: Callable[[], torch.Tensor]


class Collected:
    """Named tensors; iterating gives (name, whole fp32 tensor on the host), whole on rank 0 alone.

    All processes must iterate, to the end, over the same collections in the same order; it may be done in a thread
    while others train, if `keep` was called before. like: the tensors on the meta device.
    """

    def __init__(
        self, held: dict[str, Held], device: torch.device, world_size: int, group: dist.ProcessGroup | None
    ) -> None:
        self._held, self._device, self._world_size, self._group = held, device, world_size, group
        self._kept: dict[str, torch.Tensor] = {}
        self.like = {name: torch.empty(held.shape, device="meta") for name, held in self._held.items()}

    def keep(self, buffers: dict[str, torch.Tensor]) -> None:
        """Copies this process's parts to the host, so that the collection stays what it is now.

        buffers: where to, by name; those that are missing are made, and can be used again once the collection was
        iterated over. Returns when the copies are there.
        """
        for name, held in self._held.items():
            if held.owner:
                local = held.tensor()
                if name not in buffers:
                    pin = self._device.type == "cuda"
                    buffers[name] = torch.empty(local.shape, dtype=torch.float32, pin_memory=pin)
                self._kept[name] = buffers[name].copy_(local, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, held in self._held.items():
            yield name, self._whole(name, held)

    @torch.no_grad()
    def _whole(self, name: str, held: Held) -> torch.Tensor:
        if self._world_size == 1:
            local = self._kept[name] if name in self._kept else held.tensor()
            return local.to("cpu", torch.float32).view(held.shape)
        whole = torch.zeros(held.shape)
        if held.owner:
            held.region(whole).copy_(self._kept[name] if name in self._kept else held.tensor())
        dist.reduce(whole, 0, group=self._group)
        return whole
