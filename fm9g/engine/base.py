"""What a trainer needs from a sharding engine.

An engine takes a plain model from the meta device, decides where its weights live, and does with them what involves
other processes. It knows nothing of data, files or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov, Hutter 2019). lr_scales: weight name -> factor on the learning rate of a step."""

    lr_scales: dict[str, float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Engine(Protocol):
    """One process's part of a training run."""

    rank: int
    world_size: int
    device: torch.device

    def prepare(
        self,
        model: torch.nn.Module,
        fill: Callable[[str, torch.Tensor], None],
        optimizer: AdamW,
        dtype: torch.dtype,
        checkpointed: list[torch.nn.Module],
    ) -> None:
        """Places a model that was built on the meta device and makes its optimizer.

        fill: writes the values of the weight of that name into a tensor. dtype: of the computation; the weights are
        fp32. checkpointed: modules whose activations are recomputed in the backward pass.
        """

    def forward(self, batch: Any) -> Any:
        """The model's result for a batch, to be handed to backward."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of a loss, which is already divided by what the whole step is divided by."""

    def step(self, lr: float, max_norm: float) -> torch.Tensor:
        """Clips the summed gradients to max_norm (0: not), updates the weights, clears the gradients.

        Returns the norm before clipping, over all ranks, still on the device.
        """

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all ranks."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its full name, whole, fp32, on the host, one at a time. All ranks must iterate."""

    def optimizer_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """The optimizer's state of this rank, by full weight name."""

    def load_optimizer_state(self, state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Restores what optimizer_state gave. Raises UserError where the names do not match."""

    def random_state(self) -> dict[str, torch.Tensor]:
        """The state of the generators that dropout draws from, of this rank."""

    def load_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restores what random_state gave."""
