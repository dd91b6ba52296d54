"""Saves the checkpoints of a run, at once or in the background, and deletes old ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.save import Snapshot, save_checkpoint
from fm9g.checkpoint.steps import best_step, list_steps, mark_abandoned
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_rmtree
from fm9g.io.pt_file import Tensors

EventCallback = Callable[[int, str, str], None]


class CheckpointManager:
    """Exists on every rank: all ranks gather the tensors, rank 0 writes. The attributes are meaningful on rank 0.

    Attributes:
        last_saved_step: step of the last complete checkpoint, None if there is none.
        failure: why the last save failed; empty if it did not.
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
        """Prepares saving; no file is touched before the first save.

        Args:
            root: the folder of the run's checkpoints.
            is_rank_zero: whether this is rank 0.
            async_save: copy the tensors and write the copies in a thread.
            max_to_keep: number of checkpoints to keep, 0 for all.
            obsolete_steps: checkpoints of an overwritten run, deleted after the first save of this one.
            abandoned_steps: checkpoints after the resumed step, renamed before the first save.
            on_event: called with step, kind and text of each event, in the thread that writes.
        """
        self._root, self._max_to_keep, self._on_event = root, max_to_keep, on_event
        self._is_rank_zero, self._async_save = is_rank_zero, async_save
        self._obsolete_steps, self._abandoned_steps = obsolete_steps, abandoned_steps
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}
        self.last_saved_step: int | None = None
        self.failure = ""

    def save(self, snapshot: Snapshot) -> None:
        """Waits for the previous save, then writes a checkpoint or starts to.

        A failure to write files is reported through `on_event` and `failure`, and does not stop training.
        """
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
        """Returns when no save is running, or after `seconds`. Raises what a save in the background raised."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write_in_background(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # raised again in the training thread
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        remaining: dict[str, Any] = {kind: _RemainingTensors(tensors) for kind, tensors in snapshot.tensors().items()}
        if self._is_rank_zero:
            self._write_files(replace(snapshot, **remaining))
        for rest in remaining.values():  # other ranks send all tensors, even after a failed write
            for _ in rest:
                pass

    def _write_files(self, snapshot: Snapshot) -> None:
        step = snapshot.step
        try:
            if self._abandoned_steps:
                mark_abandoned(self._root, self._abandoned_steps)
                self._abandoned_steps = []
            save_checkpoint(self._root, snapshot)
        except UserError as error:
            self.failure = str(error)
            last = self.last_saved_step
            previous = "" if last is None else f"; the last complete one is {self._root / str(last)}"
            self._on_event(step, "save_failed", f"no checkpoint was saved at this step{previous}: {error}")
            return
        self.failure, self.last_saved_step = "", step
        self._on_event(step, "save", f"checkpoint written: {self._root / str(step)}")
        try:
            self._prune()
        except OSError as error:  # too many checkpoints remain until the next save
            self._on_event(step, "prune_failed", f"an old checkpoint could not be deleted: {error}")

    def _prune(self) -> None:
        """Deletes obsolete checkpoints, and those beyond the limit except the newest ones and the best one."""
        while self._obsolete_steps:
            if (step := self._obsolete_steps[-1]) != self.last_saved_step:
                atomic_rmtree(self._root / str(step))
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
    """An iterator over tensors that a second consumer can continue."""

    def __init__(self, tensors: Tensors) -> None:
        self.meta, self._iterator = tensors.meta, iter(tensors)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._iterator
