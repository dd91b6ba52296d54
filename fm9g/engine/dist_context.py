"""The processes of a run: this one's rank and device, and collective operations on values of the hosts."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store

from fm9g.errors import UserError
from fm9g.process_memory import tune_malloc

T = TypeVar("T")
# One rank may read or write for hours while others wait. The watchdog of fm9g.launch detects lost ranks.
NO_TIMEOUT = datetime.timedelta(days=30)


class DistContext:
    """The processes that train together, of which this is one. Use it as a context manager.

    Attributes:
        device: of this process.
        background_group: a second group over the hosts, for threads that collect a checkpoint while training continues;
            None with a single process.
    """

    def __init__(
        self,
        device: str = "auto",
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        local_world_size: int = 1,
        store: Store | None = None,
        nccl: bool = True,
    ) -> None:
        """
        Args:
            device: auto, cpu or cuda; of the GPUs the process takes number local_rank.
            local_rank, local_world_size: this process among those on this machine.
            store: through which the processes find each other; a single process needs none.
            nccl: whether torch.distributed must send between GPUs; bmtrain brings its own communicator.

        Raises:
            UserError: if there is no GPU for this process.
        """
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.store = store or HashStore()
        self.store.set_timeout(NO_TIMEOUT)  # NCCL waits in the store for ranks that still read their data
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device == "cuda" and not gpus:
            raise UserError("device: cuda, but torch sees no GPU here; use auto or cpu")
        if gpus and device != "cpu" and local_rank >= gpus:
            raise UserError(
                f"process {local_rank} of this machine has no GPU: torch sees {gpus}. Start fewer processes (n_gpus "
                "or --nproc), or check CUDA_VISIBLE_DEVICES"
            )
        if gpus and device != "cpu":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
            tune_malloc()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl and self.device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            store=self.store,
            timeout=NO_TIMEOUT,
        )
        self.background_group = dist.new_group(backend="gloo", timeout=NO_TIMEOUT) if world_size > 1 else None

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """The elementwise sum over all processes. Waits for their hosts, not for their GPUs."""
        return self._all_reduce_sum(torch.tensor(numbers, dtype=torch.int64))

    def all_reduce_sum_floats(self, numbers: Sequence[float]) -> list[float]:
        """As all_reduce_sum, in float64."""
        return self._all_reduce_sum(torch.tensor(numbers, dtype=torch.float64))

    def _all_reduce_sum(self, total: torch.Tensor) -> list[Any]:
        dist.all_reduce(total)
        values: list[Any] = total.tolist()
        return values

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value."""
        values = [value]
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]

    def __enter__(self) -> DistContext:
        return self

    def __exit__(self, exc_type: Any, *_: object) -> None:
        # After an error, other processes may hang in a message to this one; waiting for them would hang too.
        if exc_type is None or self.world_size == 1:
            dist.destroy_process_group()
