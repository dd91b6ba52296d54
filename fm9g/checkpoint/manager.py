"""Writes the checkpoints of a run one after the other, at once or beside the training, and keeps their folder tidy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.checkpoint import Snapshot, Tensors, best_step, list_steps, mark_abandoned, save_checkpoint
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_rmtree

EventCallback = Callable[[int, str, str], None]


class CheckpointManager:
    """One on every rank: all of them collect, rank 0 writes. Attributes speak of rank 0.

    last_saved_step: the step of the last checkpoint that is whole. failure: why the last one is not, or empty.
    """

    def __init__(
        self,
        root: Path,
        *,
        is_rank_zero: bool,
        async_save: bool,
        max_to_keep: int,
        obsolete_steps: list[int],
        abandoned_steps: list[int],
        on_event: EventCallback,
    ) -> None:
        """is_rank_zero: this is rank 0. async_save: write in a thread, from copies. max_to_keep: checkpoints to keep,
        0 for all. obsolete_steps: steps of another run, deleted when this one has a checkpoint. abandoned_steps: steps
        of a course that is left, set aside before this one's first is written. on_event: (step, kind, text) of an
        event, called in the thread.
        """
        self._root, self._is_rank_zero, self._async_save, self._max_to_keep = (
            root,
            is_rank_zero,
            async_save,
            max_to_keep,
        )
        self._obsolete_steps, self._abandoned_steps, self._on_event = obsolete_steps, abandoned_steps, on_event
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}
        self.last_saved_step: int | None = None
        self.failure = ""

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, or begins to, when the one before it is written. What goes wrong with files is told, and
        ends nothing."""
        self.wait()
        if not self._async_save:
            self._write(snapshot)
            return
        for kind, tensors in snapshot.tensors().items():
            tensors.stage_to_host(self._buffers.setdefault(kind, {}))
        self._thread = threading.Thread(
            target=self._write_in_background, args=[snapshot], daemon=True, name="checkpoint"
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when nothing is being written, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write_in_background(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # shown by the thread that trains
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        remaining: dict[str, Any] = {kind: _RemainingTensors(tensors) for kind, tensors in snapshot.tensors().items()}
        if self._is_rank_zero:
            try:
                if self._abandoned_steps:
                    mark_abandoned(self._root, self._abandoned_steps)
                    self._abandoned_steps = []
                save_checkpoint(self._root, replace(snapshot, **remaining))
                self.failure, self.last_saved_step = "", snapshot.step
                self._on_event(snapshot.step, "save", f"checkpoint written: {self._root / str(snapshot.step)}")
            except UserError as error:
                self.failure = str(error)
                last = (
                    ""
                    if self.last_saved_step is None
                    else f"; the last good one is {self._root / str(self.last_saved_step)}"
                )
                self._on_event(snapshot.step, "save_failed", f"no checkpoint of this step{last}: {error}")
            else:
                try:
                    self._prune()
                except OSError as error:  # more is kept than was wanted, until the next checkpoint
                    self._on_event(snapshot.step, "tidy_failed", f"an old checkpoint could not be deleted: {error}")
        for rest in remaining.values():  # the other ranks hand over everything, whatever became of it
            for _ in rest:
                pass

    def _prune(self) -> None:
        """Deletes what is no longer kept: of a run before, and beyond the limit all but the last and the best."""
        while self._obsolete_steps:
            if (old := self._obsolete_steps[-1]) != self.last_saved_step:
                atomic_rmtree(self._root / str(old))
            self._obsolete_steps.pop()
        steps = list_steps(self._root)
        if self._max_to_keep and len(steps) > self._max_to_keep:
            keep = steps[-self._max_to_keep :]
            best = best_step(self._root)
            if best is not None and best not in keep:
                keep = [best, *steps[-max(1, self._max_to_keep - 1) :]]
            for step in set(steps) - set(keep):
                atomic_rmtree(self._root / str(step))


class _RemainingTensors:
    """Tensors that can be gone on with where somebody stopped."""

    def __init__(self, tensors: Tensors) -> None:
        self.meta, self._iterator = tensors.meta, iter(tensors)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._iterator
