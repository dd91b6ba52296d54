"""Whole tensors from the parts of all processes, on the host of rank 0, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class GatherSpec:
    """What this process holds of a tensor. shape: of the whole. local_view: the view of a whole tensor that is the
    part. is_primary: this process, of those that hold the same part, speaks for it. tensor: the part now."""

    shape: torch.Size
    local_view: Callable[[torch.Tensor], torch.Tensor]
    is_primary: bool
    tensor: Callable[[], torch.Tensor]


class GatheredStateDict:
    """Named tensors; iterating gives (name, whole fp32 tensor on the host), whole on rank 0 alone.

    All processes must iterate, to the end, over the same collections in the same order; it may be done in a thread
    while others train, if `stage_to_host` was called before. meta: the tensors on the meta device.
    """

    def __init__(
        self, specs: dict[str, GatherSpec], device: torch.device, world_size: int, group: dist.ProcessGroup | None
    ) -> None:
        self._specs, self._device, self._world_size, self._group = specs, device, world_size, group
        self._staged: dict[str, torch.Tensor] = {}
        self.meta = {name: torch.empty(spec.shape, device="meta") for name, spec in self._specs.items()}

    def stage_to_host(self, buffers: dict[str, torch.Tensor]) -> None:
        """Copies this process's parts to the host, so that the collection stays what it is now.

        buffers: where to, by name; those that are missing are made, and can be used again once the collection was
        iterated over. Returns when the copies are there.
        """
        for name, spec in self._specs.items():
            if spec.is_primary:
                local = spec.tensor()
                if name not in buffers:
                    pin = self._device.type == "cuda"
                    buffers[name] = torch.empty(local.shape, dtype=torch.float32, pin_memory=pin)
                self._staged[name] = buffers[name].copy_(local, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, spec in self._specs.items():
            yield name, self._full_tensor(name, spec)

    @torch.no_grad()
    def _full_tensor(self, name: str, spec: GatherSpec) -> torch.Tensor:
        if self._world_size == 1:
            local = self._staged[name] if name in self._staged else spec.tensor()
            return local.to("cpu", torch.float32).view(spec.shape)
        full = torch.zeros(spec.shape)
        if spec.is_primary:
            spec.local_view(full).copy_(self._staged[name] if name in self._staged else spec.tensor())
        dist.reduce(full, 0, group=self._group)
        return full
