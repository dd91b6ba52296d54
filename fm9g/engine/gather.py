"""Full tensors on the host of rank 0 from the shards of all processes, one tensor at a time.

A weight of 8 rows on 2 replicas x 2 shards (dp_replicate x dp_shard), primary shards marked *:

    rank 0 *  rows 0-3 ──┐ rows 0-3 of zeros (8, C)
    rank 1 *  rows 4-7 ──┤ rows 4-7 of zeros (8, C)        sum to rank 0, over gloo
    rank 2    rows 0-3 ──┤ zeros (8, C)              ─────────────────────────────────>  rank 0: rows 0-7
    rank 3    rows 4-7 ──┘ zeros (8, C)

The sum moves more than a gather would, but is right for any region that a process may hold: rows of FSDP2, rows or
columns of tensor parallelism, a flat range of bmtrain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class GatherSpec:
    """This process's part of a tensor.

    Args:
        shape: of the full tensor.
        local_view: the view of a full tensor that is this part.
        is_primary: whether this process contributes, of those that hold the same part.
        tensor: returns the current values of the part.
    """

    shape: torch.Size
    local_view: Callable[[torch.Tensor], torch.Tensor]
    is_primary: bool
    tensor: Callable[[], torch.Tensor]


class GatheredStateDict:
    """Named tensors. Iteration yields (name, fp32 tensor on the host), which is complete on rank 0 alone.

    All processes must iterate to the end, over the same state dicts in the same order. A thread may iterate while the
    training continues, if `stage_to_host` was called before.

    Attributes:
        meta: the full tensors on the meta device, by name.
    """

    def __init__(
        self, specs: dict[str, GatherSpec], device: torch.device, world_size: int, group: dist.ProcessGroup | None
    ) -> None:
        """group: of the messages; None: the default group."""
        self._specs, self._device, self._world_size, self._group = specs, device, world_size, group
        self._staged: dict[str, torch.Tensor] = {}
        self.meta = {name: torch.empty(spec.shape, device="meta") for name, spec in self._specs.items()}

    def stage_to_host(self, buffers: dict[str, torch.Tensor]) -> None:
        """Copies this process's parts to the host, so that later training does not change them. Waits for the copies.

        Args:
            buffers: name to the memory for a copy. Missing ones are added; all can be reused after the iteration.
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
            return self._local(name, spec).to("cpu", torch.float32).view(spec.shape)
        full = torch.zeros(spec.shape)
        if spec.is_primary:
            spec.local_view(full).copy_(self._local(name, spec))
        dist.reduce(full, 0, group=self._group)
        return full

    def _local(self, name: str, spec: GatherSpec) -> torch.Tensor:
        return self._staged[name] if name in self._staged else spec.tensor()
