"""The data of a run: its mixture and loader, and the loader run alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.load.encoding_pool import build_token_cache
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError
from fm9g.progress import Progress
from fm9g.train.signals import SignalHandler


def open_mixture(run: RunConfig, date: str = "") -> tuple[Mixture, list[str]]:
    """The data of a run, its token caches made where they are asked for; and what there is to know, a line each.

    date: what templates write as today's, where the configuration has none; empty: today.
    """
    config = run.train.value
    mixture = _mixture(run, config.token_cache_dir, config.chat_template_date or date)
    notes = run.notes + mixture.notes() + mixture.preview()
    if config.token_cache_dir:
        mixture, about_caches = build_token_cache(mixture, config.dataloader_num_workers)
        notes += about_caches
    return mixture, notes


def count_tokens(run: RunConfig) -> float:
    """About how many tokens an epoch has; nothing is written. Raises UserError where the data cannot be read."""
    if not run.mixture or not run.train.value.tokenizer_path:
        raise UserError("dataset_config and tokenizer_path are not both given")
    return _mixture(run, token_cache_dir="", date=run.train.value.chat_template_date).count_tokens()


def _mixture(run: RunConfig, token_cache_dir: str, date: str) -> Mixture:
    config = run.train.value
    return Mixture(
        [item.value for item in run.mixture],
        config.tokenizer_path,
        config.max_length,
        config.seed,
        config.batch_size * config.max_length,
        token_cache_dir,
        date,
    )


def open_loader(
    config: TrainConfig, mixture: Mixture, rank: int = 0, world_size: int = 1, position: dict[str, Any] | None = None
) -> Loader:
    """The loader of a rank, from its start or from the position of a checkpoint."""
    return Loader(
        mixture,
        global_batch_size=config.packs_per_step(world_size),
        rank=rank,
        world_size=world_size,
        workers=config.dataloader_num_workers,
        prefetch=config.dataloader_prefetch_factor,
        state=position,
        allow_changes=config.on_data_change == "allow",
    )


@dataclass
class LoaderBenchmark:
    """What the loader gave when it ran alone.

    tokens: of each dataset; target_shares: what their shares were to be. padded_tokens: tokens and padding.
    tokens_per_second: after the first step, before which the workers start. skipped: records by reason.
    """

    tokens: dict[str, int]
    target_shares: dict[str, float]
    skipped: dict[str, int]
    steps: int = 0
    padded_tokens: int = 0
    tokens_per_second: float = 0.0


def benchmark_dataloader(run: RunConfig) -> LoaderBenchmark:
    """Makes the packs of train_iters steps, or as many as there are, and trains on none. Raises UserError."""
    config = run.train.value
    mixture, notes = open_mixture(run)
    for note in notes:
        print(f"note: {note}")
    tasks = [item.value.task_name for item in run.mixture]
    result = LoaderBenchmark({}, dict(zip(tasks, mixture.proportions())), {})
    tokens, first_step_tokens, started = np.zeros(len(tasks), np.int64), 0, 0.0
    with (
        open_loader(config, mixture) as loader,
        Progress("loading data", config.train_iters, "steps") as progress,
        SignalHandler("stopping after this step") as signal_handler,
    ):
        while result.steps < config.train_iters and not signal_handler.stop_requested:
            packs = loader.next_batch()
            if not any(pack.tokens for pack in packs):
                break
            for pack in packs:
                tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=len(tasks))
                result.padded_tokens += len(pack.input_ids)
            result.steps += 1
            if result.steps == 1:
                first_step_tokens, started = int(tokens.sum()), time.monotonic()
            progress.advance()
        result.tokens_per_second = (int(tokens.sum()) - first_step_tokens) / max(time.monotonic() - started, 1e-9)
        result.skipped = loader.skipped()
    result.tokens = dict(zip(tasks, tokens.tolist()))
    return result
