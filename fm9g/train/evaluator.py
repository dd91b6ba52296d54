"""Evaluation: the loss on data that is not trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count

import torch

from fm9g.config.run import RunConfig
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.train.loop import to_batch


class Evaluator:
    """The validation data of a run, the same rows each time, dealt to the replicas. mixture: the data itself."""

    def __init__(self, run: RunConfig, engine: Engine, train_mixture: Mixture) -> None:
        """train_mixture: the run's own data, which has the tokenizer and the date. Raises UserError where the data
        cannot be read."""
        config = run.train.value
        self._engine, self._tasks = engine, [item.value.task_name for item in run.validation]
        dp_size = config.dp_size(engine.dist_context.world_size)
        self._max_packs = config.eval_batches // dp_size
        if config.eval_batches and not self._max_packs:
            raise UserError(f"eval_batches {config.eval_batches} is less than the processes, {dp_size}")
        self.mixture = Mixture(
            [replace(item.value, allow_repeat=False) for item in run.validation],
            train_mixture.tokenizer,
            config.max_length,
            config.seed,
            config.batch_size * config.max_length,
            date=train_mixture.spec.date,
        )
        self._packs: list[Pack] | None = None

    def run(self) -> dict[str, float]:
        """Loss/val, Loss/val/TASK (nats, mean over targets by weight) and Perplexity/val, .../TASK (exp of these).

        All ranks must take part. Raises UserError where the data gives no target.
        """
        engine, packs = self._engine, self.load_packs()
        losses = torch.zeros(len(self._tasks), device=engine.device)
        targets = torch.zeros(len(self._tasks), device=engine.device)
        task_indices = torch.arange(len(self._tasks), device=engine.device)[:, None]
        max_packs = max(engine.dist_context.all_gather_object(len(packs)))
        for number in range(max_packs):
            # A replica that has no row left computes along with the others: weights are gathered together.
            batch, tasks = to_batch(packs[min(number, len(packs) - 1)], engine.device)
            _, row_losses = engine.evaluate(batch)
            if number < len(packs):
                is_task = tasks == task_indices
                weights = torch.ones_like(row_losses) if batch.target_weights is None else batch.target_weights
                losses += torch.where(is_task, row_losses * weights, 0.0).sum(1)
                targets += torch.where(is_task, weights, 0.0).sum(1)
        sums, counts = engine.dp_sum(losses).tolist(), engine.dp_sum(targets).tolist()
        if not sum(counts):
            raise UserError("val_dataset: no record of it gave a sample")
        means = {"": sum(sums) / sum(counts)}
        means |= {f"/{task}": loss / n for task, loss, n in zip(self._tasks, sums, counts) if n}
        metrics = {f"Loss/val{task}": loss for task, loss in means.items()}
        return metrics | {f"Perplexity/val{task}": math.exp(min(loss, 700)) for task, loss in means.items()}

    def load_packs(self) -> list[Pack]:
        """This replica's rows, each dataset once; the last may be empty. They are kept: encoding takes its time.

        Raises UserError that names a bad record.
        """
        if self._packs is None:
            engine = self._engine
            count_of = engine.dp_size
            with Loader(self.mixture, global_batch_size=count_of, rank=engine.dp_rank, world_size=count_of) as loader:
                self._packs = []
                for number in count():
                    pack = loader.next_batch()[0]
                    if number and (not pack.tokens or number == self._max_packs):
                        break
                    self._packs.append(pack)
        return self._packs
