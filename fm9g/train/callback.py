"""What the training loop calls at its events. fm9g.train.callbacks has the callbacks of a run.

Order of events in one step; those in parentheses do not happen in every step:

    on_step_begin
        forward and backward over the micro-batches
    (on_before_optimizer_step)   unless the step ran out of memory
        optimizer step
    on_step_end
    (on_step_skipped)            for earlier steps too: a gradient norm reaches the host late
    (on_log) (on_evaluate) (on_save)

All ranks call the same events in the same order, so a callback may use collectives, except in on_step_skipped.
"""

from __future__ import annotations

from collections.abc import Iterable

from fm9g.train.skipped_steps import SkippedStep
from fm9g.train.state import TrainState


class Callback:
    """Base class: does nothing at any event. Requests to the loop go into `state.control`."""

    def on_step_begin(self, state: TrainState) -> None:
        """A batch is loaded; state.step is the number of finished steps. Requests set here apply to this step."""

    def on_before_optimizer_step(self, state: TrainState) -> None:
        """The gradients of step state.step are complete, and its weights are not updated yet."""

    def on_step_end(self, state: TrainState) -> None:
        """Step state.step is finished."""

    def on_step_skipped(self, state: TrainState, skipped: SkippedStep) -> None:
        """An earlier step, or this one, left the weights as they were. Each rank reports its own packs."""

    def on_log(self, state: TrainState, metrics: dict[str, float]) -> None:
        """It is time to log. metrics: tag -> value of the last step, the same on all ranks."""

    def on_evaluate(self, state: TrainState) -> None:
        """It is time to evaluate. A request to stop that is set here must be set on all ranks."""

    def on_save(self, state: TrainState) -> None:
        """It is time to save a checkpoint."""


class CallbackList(Callback):
    """Passes each event on to several callbacks, in their order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)

    def on_step_begin(self, state: TrainState) -> None:
        for callback in self._callbacks:
            callback.on_step_begin(state)

    def on_before_optimizer_step(self, state: TrainState) -> None:
        for callback in self._callbacks:
            callback.on_before_optimizer_step(state)

    def on_step_end(self, state: TrainState) -> None:
        for callback in self._callbacks:
            callback.on_step_end(state)

    def on_step_skipped(self, state: TrainState, skipped: SkippedStep) -> None:
        for callback in self._callbacks:
            callback.on_step_skipped(state, skipped)

    def on_log(self, state: TrainState, metrics: dict[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_log(state, metrics)

    def on_evaluate(self, state: TrainState) -> None:
        for callback in self._callbacks:
            callback.on_evaluate(state)

    def on_save(self, state: TrainState) -> None:
        for callback in self._callbacks:
            callback.on_save(state)
