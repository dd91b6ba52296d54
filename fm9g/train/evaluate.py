"""Evaluation: the loss on data that is not trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import torch

from fm9g.config.run import RunConfig
from fm9g.data.loader import Loader
from fm9g.data.mixture import Mixture
from fm9g.data.pack import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.train.loop import to_batch


class Evaluation:
    """The validation data of a run, the same rows each time, dealt to the replicas. mixture: the data itself."""

    def __init__(self, run: RunConfig, engine: Engine, training: Mixture) -> None:
        """training: the run's own data, which has the tokenizer and the date. Raises UserError where the data cannot be
        read."""
        config = run.train.value
        self._engine, self._tasks = engine, [item.value.task_name for item in run.validation]
        replicas = config.replicas(engine.processes.world_size)
        self._most = config.eval_batches // replicas
        if config.eval_batches and not self._most:
            raise UserError(f"eval_batches {config.eval_batches} is less than the processes, {replicas}")
        self.mixture = Mixture(
            [replace(item.value, allow_repeat=False) for item in run.validation],
            training.tokenizer,
            config.max_length,
            config.seed,
            config.batch_size * config.max_length,
            date=training.recipe.date,
        )
        self._rows: list[Pack] | None = None

    def run(self) -> dict[str, float]:
        """Loss/val, Loss/val/TASK (nats, mean over targets by weight) and Perplexity/val, .../TASK (exp of these).

        All ranks must take part. Raises UserError where the data gives no target.
        """
        engine, rows = self._engine, self.read()
        losses = torch.zeros(len(self._tasks), device=engine.device)
        targets = torch.zeros(len(self._tasks), device=engine.device)
        numbers = torch.arange(len(self._tasks), device=engine.device)[:, None]
        most = max(engine.processes.gather(len(rows)))
        for number in range(most):
            # A replica that has no row left computes along with the others: weights are gathered together.
            batch, tasks = to_batch(rows[min(number, len(rows) - 1)], engine.device)
            _, row_losses = engine.evaluate(batch)
            if number < len(rows):
                here = tasks == numbers
                weights = torch.ones_like(row_losses) if batch.target_weights is None else batch.target_weights
                losses += torch.where(here, row_losses * weights, 0.0).sum(1)
                targets += torch.where(here, weights, 0.0).sum(1)
        sums, counts = engine.sum(losses).tolist(), engine.sum(targets).tolist()
        if not sum(counts):
            raise UserError("val_dataset: no record of it gave a sample")
        means = {"": sum(sums) / sum(counts)}
        means |= {f"/{task}": loss / n for task, loss, n in zip(self._tasks, sums, counts) if n}
        figures = {f"Loss/val{task}": loss for task, loss in means.items()}
        return figures | {f"Perplexity/val{task}": math.exp(min(loss, 700)) for task, loss in means.items()}

    def read(self) -> list[Pack]:
        """This replica's rows, each dataset once; the last may be empty. They are kept: encoding takes its time.

        Raises UserError that names a bad record.
        """
        if self._rows is None:
            engine = self._engine
            count_of = engine.replicas
            with Loader(self.mixture, global_batch=count_of, rank=engine.replica, world_size=count_of) as loader:
                self._rows = []
                for number in count():
                    pack = loader.next_step()[0]
                    if number and (not pack.tokens or number == self._most):
                        break
                    self._rows.append(pack)
        return self._rows
