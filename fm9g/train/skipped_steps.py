"""Steps that changed nothing, found without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch

from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.memory import TRAINING_OOM_ADVICE

OUT_OF_MEMORY = "it did not fit in memory"


class SkippedStepDetector:
    """Looks at the norms of steps when they have come to the host.

    consecutive: skipped steps up to the last one looked at.
    """

    def __init__(self, engine: Engine, max_consecutive: int) -> None:
        """max_consecutive: skipped steps in a row that end the run."""
        self._engine, self._max_consecutive, self.consecutive, self._last_reason = engine, max_consecutive, 0, ""
        self._pending: deque[tuple[int, list[Pack], torch.Tensor, torch.cuda.Event | None, bool]] = deque()

    def add(self, step: int, packs: list[Pack], norm: torch.Tensor, oom: bool) -> None:
        """norm: of the gradients, on the device. oom: there are none, for lack of memory."""
        event = None
        if norm.is_cuda:
            host_norm = torch.empty((), pin_memory=True).copy_(norm, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            norm = host_norm
        self._pending.append((step, packs, norm, event, oom))

    def poll(self, wait: bool) -> Iterator[tuple[int, list[Pack], str]]:
        """Bad steps among those whose norm is here, or with `wait` among all: step, packs and reason."""
        while self._pending and (wait or (event := self._pending[0][3]) is None or event.query()):
            step, packs, norm, event, oom = self._pending.popleft()
            if event is not None:
                event.synchronize()
            value, scaler = norm.item(), self._engine.loss_scaler
            # A norm that overflows is what loss scaling is there for.
            if math.isfinite(value) or (scaler.growth_interval and scaler.scale > 1 and not oom):
                self.consecutive = 0
                continue
            self.consecutive += 1
            self._last_reason = OUT_OF_MEMORY if oom else f"the norm of the gradients is {value}"
            yield step, packs, self._last_reason

    def raise_if_too_many(self) -> None:
        """Raises UserError where there are too many in a row."""
        if self.consecutive < self._max_consecutive:
            return
        advice = (
            TRAINING_OOM_ADVICE
            if self._last_reason == OUT_OF_MEMORY
            else "resume from an earlier checkpoint with a lower lr, or look at the batches that were kept"
        )
        raise UserError(
            f"{self.consecutive} steps in a row were skipped, the last because {self._last_reason} "
            f"(max_skipped_steps). Nothing of them is in the weights, and no checkpoint was made since; {advice}"
        )
