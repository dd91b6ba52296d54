"""The data of a run: its mixture and loader, and the loader run alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.loader import Loader
from fm9g.data.mixture import Mixture
from fm9g.data.pool import fill_cache
from fm9g.errors import UserError
from fm9g.progress import Progress
from fm9g.train.interrupt import Interrupt


def open_mixture(run: RunConfig, date: str = "") -> tuple[Mixture, list[str]]:
    """The data of a run, its token caches made where they are asked for; and what there is to know, a line each.

    date: what templates write as today's, where the configuration has none; empty: today.
    """
    config = run.train.value
    mixture = _mixture(run, config.token_cache, config.template_date or date)
    notes = run.notes + mixture.notes() + mixture.preview()
    if config.token_cache:
        mixture, about_caches = fill_cache(mixture, config.dataloader_num_workers)
        notes += about_caches
    return mixture, notes


def count_tokens(run: RunConfig) -> float:
    """About how many tokens an epoch has; nothing is written. Raises UserError where the data cannot be read."""
    if not run.mixture or not run.train.value.tokenizer_path:
        raise UserError("dataset_config and tokenizer_path are not both given")
    return _mixture(run, token_cache="", date=run.train.value.template_date).count_tokens()


def _mixture(run: RunConfig, token_cache: str, date: str) -> Mixture:
    config = run.train.value
    return Mixture(
        [item.value for item in run.mixture],
        config.tokenizer_path,
        config.max_length,
        config.seed,
        config.batch_size * config.max_length,
        token_cache,
        date,
    )


def open_loader(
    config: TrainConfig, mixture: Mixture, rank: int = 0, world_size: int = 1, position: dict[str, Any] | None = None
) -> Loader:
    """The loader of a rank, from its start or from the position of a checkpoint."""
    return Loader(
        mixture,
        global_batch=config.packs_a_step(world_size),
        rank=rank,
        world_size=world_size,
        workers=config.dataloader_num_workers,
        prefetch=config.dataloader_prefetch_factor,
        position=position,
        carry=config.data_changes == "carry",
    )


@dataclass
class LoaderRun:
    """What the loader gave when it ran alone.

    tokens: of each dataset; wanted: what their shares were to be. positions: tokens and padding. rate: tokens a second
    after the first step, before which the workers start. skipped: records by reason.
    """

    tokens: dict[str, int]
    wanted: dict[str, float]
    skipped: dict[str, int]
    steps: int = 0
    positions: int = 0
    rate: float = 0.0


def run_dataloader(run: RunConfig) -> LoaderRun:
    """Makes the packs of train_iters steps, or as many as there are, and trains on none. Raises UserError."""
    config = run.train.value
    mixture, notes = open_mixture(run)
    for note in notes:
        print(f"note: {note}")
    tasks = [item.value.task_name for item in run.mixture]
    result = LoaderRun({}, dict(zip(tasks, mixture.shares())), {})
    tokens, first, started = np.zeros(len(tasks), np.int64), 0, 0.0
    with (
        open_loader(config, mixture) as loader,
        Progress("loading data", config.train_iters, "steps") as progress,
        Interrupt("stopping after this step") as interrupt,
    ):
        while result.steps < config.train_iters and not interrupt.requested:
            packs = loader.next_step()
            if not any(pack.tokens for pack in packs):
                break
            for pack in packs:
                tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=len(tasks))
                result.positions += len(pack.input_ids)
            result.steps += 1
            if result.steps == 1:
                first, started = int(tokens.sum()), time.monotonic()
            progress.advance()
        result.rate = (int(tokens.sum()) - first) / max(time.monotonic() - started, 1e-9)
        result.skipped = loader.skipped()
    result.tokens = dict(zip(tasks, tokens.tolist()))
    return result
