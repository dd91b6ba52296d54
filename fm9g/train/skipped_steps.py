"""Finds steps that left the weights as they were, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.out_of_memory import TRAINING_OOM_ADVICE


@dataclass(frozen=True)
class SkippedStep:
    """packs: the batch of this rank. oom: it did not fit in memory; else the gradient norm was not finite."""

    step: int
    packs: list[Pack]
    reason: str
    oom: bool


@dataclass(frozen=True)
class _PendingStep:
    """A step whose gradient norm is on its way to the host. copied: None where it is there already."""

    step: int
    packs: list[Pack]
    norm: torch.Tensor
    copied: torch.cuda.Event | None
    oom: bool

    def has_arrived(self) -> bool:
        return self.copied is None or bool(self.copied.query())


class SkippedStepDetector:
    """Checks the gradient norm of each step once the host has it.

    consecutive: skipped steps in a row, up to the last one checked.
    """

    def __init__(self, engine: Engine, max_consecutive: int) -> None:
        """max_consecutive: skipped steps in a row that end the run."""
        self._engine, self._max_consecutive = engine, max_consecutive
        self.consecutive = 0
        self._last: SkippedStep | None = None
        self._pending: deque[_PendingStep] = deque()

    def add(self, step: int, packs: list[Pack], norm: torch.Tensor, oom: bool) -> None:
        """Starts the copy of a norm to the host.

        Args:
            step: number of the step, from 1.
            packs: its batch on this rank.
            norm: () of the gradients, on the device.
            oom: the step ran out of memory, so it has no gradients.
        """
        copied = None
        if norm.is_cuda:
            host_norm = torch.empty((), pin_memory=True).copy_(norm, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            norm = host_norm
        self._pending.append(_PendingStep(step, packs, norm, copied, oom))

    def poll(self, wait: bool) -> Iterator[SkippedStep]:
        """The skipped steps among those whose norm has arrived; with `wait`, among all."""
        while self._pending and (wait or self._pending[0].has_arrived()):
            pending = self._pending.popleft()
            if pending.copied is not None:
                pending.copied.synchronize()
            norm, scaler = pending.norm.item(), self._engine.loss_scaler
            # A norm that overflows is what dynamic loss scaling is for.
            if math.isfinite(norm) or (scaler.growth_interval and scaler.scale > 1 and not pending.oom):
                self.consecutive = 0
                continue
            self.consecutive += 1
            reason = "it did not fit in memory" if pending.oom else f"the norm of the gradients is {norm}"
            self._last = SkippedStep(pending.step, pending.packs, reason, pending.oom)
            yield self._last

    def raise_if_too_many(self) -> None:
        """Raises UserError if max_consecutive steps in a row were skipped."""
        if self._last is None or self.consecutive < self._max_consecutive:
            return
        advice = (
            TRAINING_OOM_ADVICE
            if self._last.oom
            else "resume from an earlier checkpoint with a lower lr, or look at the batches that were saved"
        )
        raise UserError(
            f"{self.consecutive} steps in a row were skipped, the last because {self._last.reason} "
            f"(max_skipped_steps). They did not change the weights, and no checkpoint was written since; {advice}"
        )
