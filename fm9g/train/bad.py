"""Steps that changed nothing, found without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch

from fm9g.data.pack import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.memory import TRAINING_ADVICE

SHORT = "it did not fit in memory"


class BadSteps:
    """Looks at the norms of steps when they have come to the host. in_a_row: bad steps up to the last one looked at."""

    def __init__(self, engine: Engine, most: int) -> None:
        """most: bad steps in a row that end the run."""
        self._engine, self._most, self.in_a_row, self._last = engine, most, 0, ""
        self._pending: deque[tuple[int, list[Pack], torch.Tensor, torch.cuda.Event | None, bool]] = deque()

    def add(self, step: int, packs: list[Pack], norm: torch.Tensor, short: bool) -> None:
        """norm: of the gradients, on the device. short: there are none, for lack of memory."""
        event = None
        if norm.is_cuda:
            here = torch.empty((), pin_memory=True).copy_(norm, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            norm = here
        self._pending.append((step, packs, norm, event, short))

    def found(self, wait: bool) -> Iterator[tuple[int, list[Pack], str]]:
        """Bad steps among those whose norm is here, or with `wait` among all: step, packs and reason."""
        while self._pending and (wait or (event := self._pending[0][3]) is None or event.query()):
            step, packs, norm, event, short = self._pending.popleft()
            if event is not None:
                event.synchronize()
            value, scale = norm.item(), self._engine.loss_scale
            # A norm that overflows is what loss scaling is there for.
            if math.isfinite(value) or (scale.steps and scale.scale > 1 and not short):
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self._last = SHORT if short else f"the norm of the gradients is {value}"
            yield step, packs, self._last

    def check(self) -> None:
        """Raises UserError where there are too many in a row."""
        if self.in_a_row < self._most:
            return
        advice = (
            TRAINING_ADVICE
            if self._last == SHORT
            else "resume from an earlier checkpoint with a lower lr, or look at the batches that were kept"
        )
        raise UserError(
            f"{self.in_a_row} steps in a row were skipped, the last because {self._last} (max_bad_steps). Nothing of "
            f"them is in the weights, and no checkpoint was made since; {advice}"
        )
