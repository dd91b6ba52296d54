"""Evaluation: the loss on data that is not trained on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import count

import torch

from fm9g.config.run import RunConfig
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack
from fm9g.engine.base import Engine
from fm9g.errors import UserError
from fm9g.train.batch import sum_by_task, to_batch


class Evaluator:
    """The validation data of a run: the same packs each time, distributed over the replicas.

    mixture: the data itself.
    """

    def __init__(self, run: RunConfig, engine: Engine, train_mixture: Mixture) -> None:
        """Opens the validation data. train_mixture: has its tokenizer and date. Raises UserError."""
        config = run.train
        self._engine, self._tasks = engine, [dataset.task_name for dataset in run.validation]
        dp_size = config.dp_size(engine.dist_context.world_size)
        self._max_packs = config.eval_batches // dp_size
        if config.eval_batches and not self._max_packs:
            raise UserError(f"eval_batches {config.eval_batches} is less than the number of processes, {dp_size}")
        self.mixture = Mixture(
            [replace(dataset, allow_repeat=False) for dataset in run.validation],
            train_mixture.tokenizer,
            config.max_length,
            config.seed,
            (config.eval_batch_size or config.batch_size) * config.max_length,
            date=train_mixture.spec.date,
        )
        self._packs: list[Pack] | None = None
        self._key = next(key for key in ("val_dataset", "val_data", "val_split") if getattr(config, key))

    def run(self) -> dict[str, float]:
        """Loss/val, Loss/val/TASK (nats, mean over targets by weight) and Perplexity/val, .../TASK (exp of these).

        All ranks must take part.
        """
        engine, packs, num_tasks = self._engine, self.load_packs(), len(self._tasks)
        losses, targets = (torch.zeros(num_tasks, device=engine.device) for _ in range(2))
        max_packs = max(engine.dist_context.all_gather_object(len(packs)))
        for i in range(max_packs):
            # A replica without further packs repeats its last one: all ranks gather the weights together.
            batch, target_tasks = to_batch(packs[min(i, len(packs) - 1)], engine.device)
            _, target_losses = engine.evaluate(batch)
            if i < len(packs):
                losses += sum_by_task(target_losses, batch.target_weights, target_tasks, num_tasks)
                ones = torch.ones_like(target_losses)
                targets += sum_by_task(ones, batch.target_weights, target_tasks, num_tasks)
        sums, counts = engine.dp_sum(losses).tolist(), engine.dp_sum(targets).tolist()
        means = {"": sum(sums) / sum(counts)}
        means |= {f"/{task}": loss / n for task, loss, n in zip(self._tasks, sums, counts) if n}
        metrics = {f"Loss/val{task}": loss for task, loss in means.items()}
        return metrics | {f"Perplexity/val{task}": math.exp(min(loss, 700)) for task, loss in means.items()}

    def prepare(self) -> None:
        """Loads the data before the first step: a mistake in it should not end a run that is under way.

        All ranks must take part. Raises UserError if the data has no target.
        """
        skipped = Counter[str]()
        num_targets = sum(pack.target_tokens for pack in self.load_packs(skipped))
        reasons = sum(map(Counter, self._engine.dist_context.all_gather_object(skipped)), Counter[str]())
        if not self._engine.dist_context.all_reduce_sum([num_targets])[0]:
            why = "; ".join(f"{count} of them: {reason}" for reason, count in reasons.most_common())
            raise UserError(f"{self._key}: none of the validation records gives a sample{f' ({why})' * bool(why)}")

    def load_packs(self, skipped: Counter[str] | None = None) -> list[Pack]:
        """The packs of this replica, each dataset once; the last may be empty. Cached, since encoding takes time.

        skipped: receives the number of records without a sample, by reason.

        Raises UserError that names a bad record.
        """
        if self._packs is None:
            engine = self._engine
            with Loader(
                self.mixture, global_batch_size=engine.dp_size, rank=engine.dp_rank, world_size=engine.dp_size
            ) as loader:
                self._packs = []
                for i in count():
                    pack = loader.next_batch()[0]
                    if i and (not pack.tokens or i == self._max_packs):
                        break
                    self._packs.append(pack)
                if skipped is not None:
                    skipped.update(loader.skipped())
        return self._packs
