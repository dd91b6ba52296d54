"""Writes the checkpoints of a run one after the other, at once or beside the training, and keeps their folder tidy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.folder import Snapshot, Tensors, best_step, save_checkpoint, set_aside, steps_in
from fm9g.errors import UserError
from fm9g.files import remove_folder

Told = Callable[[int, str, str], None]


class Saver:
    """One on every rank: all of them collect, rank 0 writes. Attributes speak of rank 0.

    written: the step of the last checkpoint that is whole. failure: why the last one is not, or empty.
    """

    def __init__(
        self,
        root: Path,
        *,
        first: bool,
        background: bool,
        limit: int,
        replaced: list[int],
        left: list[int],
        told: Told,
    ) -> None:
        """first: this is rank 0. background: write in a thread, from copies. limit: checkpoints to keep, 0 for all.
        replaced: steps of another run, deleted when this one has a checkpoint. left: steps of a course that is left,
        set aside before this one's first is written. told: (step, kind, text) of an event, called in the thread.
        """
        self._root, self._first, self._background, self._limit = root, first, background, limit
        self._replaced, self._left, self._told = replaced, left, told
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}
        self.written: int | None = None
        self.failure = ""

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, or begins to, when the one before it is written. What goes wrong with files is told, and
        ends nothing."""
        self.wait()
        if not self._background:
            self._write(snapshot)
            return
        for kind, tensors in snapshot.tensors().items():
            tensors.keep(self._buffers.setdefault(kind, {}))
        self._thread = threading.Thread(target=self._write_beside, args=[snapshot], daemon=True, name="checkpoint")
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when nothing is being written, or after so many seconds."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write_beside(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # shown by the thread that trains
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        parts: dict[str, Any] = {kind: _Rest(tensors) for kind, tensors in snapshot.tensors().items()}
        if self._first:
            try:
                if self._left:
                    set_aside(self._root, self._left)
                    self._left = []
                save_checkpoint(self._root, replace(snapshot, **parts))
                self.failure, self.written = "", snapshot.step
                self._told(snapshot.step, "save", f"checkpoint written: {self._root / str(snapshot.step)}")
            except UserError as error:
                self.failure = str(error)
                last = "" if self.written is None else f"; the last good one is {self._root / str(self.written)}"
                self._told(snapshot.step, "save_failed", f"no checkpoint of this step{last}: {error}")
            else:
                try:
                    self._tidy()
                except OSError as error:  # more is kept than was wanted, until the next checkpoint
                    self._told(snapshot.step, "tidy_failed", f"an old checkpoint could not be deleted: {error}")
        for rest in parts.values():  # the other ranks hand over everything, whatever became of it
            for _ in rest:
                pass

    def _tidy(self) -> None:
        """Deletes what is no longer kept: of a run before, and beyond the limit all but the last and the best."""
        while self._replaced:
            if (old := self._replaced[-1]) != self.written:
                remove_folder(self._root / str(old))
            self._replaced.pop()
        steps = steps_in(self._root)
        if self._limit and len(steps) > self._limit:
            keep = steps[-self._limit :]
            best = best_step(self._root)
            if best is not None and best not in keep:
                keep = [best, *steps[-max(1, self._limit - 1) :]]
            for step in set(steps) - set(keep):
                remove_folder(self._root / str(step))


class _Rest:
    """Tensors that can be gone on with where somebody stopped."""

    def __init__(self, tensors: Tensors) -> None:
        self.like, self._iterator = tensors.like, iter(tensors)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._iterator
