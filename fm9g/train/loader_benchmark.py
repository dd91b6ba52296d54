"""Measures the loader alone, without training."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from fm9g.config.run import RunConfig
from fm9g.progress import Progress
from fm9g.train.data_loading import open_loader, open_mixture
from fm9g.train.pack_counts import count_tokens_by_task
from fm9g.train.signals import SignalHandler


@dataclass(frozen=True)
class LoaderBenchmark:
    """What the loader gave.

    Args:
        tokens: of each dataset.
        target_shares: share of the tokens that each dataset should have.
        skipped: skipped records by reason.
        steps: batches loaded.
        padded_tokens: tokens and padding.
        tokens_per_second: after the first step, so without the start of the workers.
    """

    tokens: dict[str, int]
    target_shares: dict[str, float]
    skipped: dict[str, int]
    steps: int
    padded_tokens: int
    tokens_per_second: float


def benchmark_dataloader(run: RunConfig) -> LoaderBenchmark:
    """Loads the batches of train_iters steps, or as many as the data gives. Raises UserError."""
    config, mixture = run.train, open_mixture(run)
    tasks = [dataset.task_name for dataset in run.mixture]
    task_tokens, steps, padded_tokens = np.zeros(len(tasks), np.int64), 0, 0
    first_step_tokens, started = 0, 0.0
    with (
        open_loader(config, mixture) as loader,
        Progress("loading data", config.train_iters, "steps") as progress,
        SignalHandler("stopping after this step") as signal_handler,
    ):
        while steps < config.train_iters and not signal_handler.stop_requested:
            packs = loader.next_batch()
            if not loader.is_infinite and not any(pack.tokens for pack in packs):
                break
            task_tokens += count_tokens_by_task(packs, len(tasks))
            padded_tokens += sum(len(pack.input_ids) for pack in packs)
            steps += 1
            if steps == 1:
                first_step_tokens, started = int(task_tokens.sum()), time.monotonic()
            progress.advance()
        seconds = max(time.monotonic() - started, 1e-9)
        return LoaderBenchmark(
            tokens=dict(zip(tasks, task_tokens.tolist())),
            target_shares=dict(zip(tasks, mixture.proportions())),
            skipped=loader.skipped(),
            steps=steps,
            padded_tokens=padded_tokens,
            tokens_per_second=(int(task_tokens.sum()) - first_step_tokens) / seconds,
        )
