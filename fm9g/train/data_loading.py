"""Opens the data of a run: its mixture and its loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.load.loader import ROW_MULTIPLE, Loader
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.mixture_checks import log_mixture_warnings
from fm9g.data.load.run_mixture import open_run_mixture
from fm9g.data.load.token_cache_builder import build_token_cache


def open_mixture(run: RunConfig, date: str = "", new_tokens: Sequence[str] | None = None) -> Mixture:
    """Opens the data of a run and builds its token caches if asked for; logs what the user should know of the data.

    Args:
        date: what templates write as today's date if the configuration has none; empty: today.
        new_tokens: those of the run; None: they are read from its file.
    """
    config = run.train
    mixture = open_run_mixture(run, config.chat_template_date or date, new_tokens=new_tokens)
    log_mixture_warnings(mixture)
    return build_token_cache(mixture, config.dataloader_num_workers) if config.token_cache_dir else mixture


def open_loader(
    config: TrainConfig, mixture: Mixture, rank: int = 0, world_size: int = 1, position: dict[str, Any] | None = None
) -> Loader:
    """The loader of a replica.

    Args:
        rank: number of the replica.
        world_size: number of replicas.
        position: loader state of a checkpoint, to resume there; None: from the start.
    """
    return Loader(
        mixture,
        global_batch_size=config.packs_per_step(world_size),
        rank=rank,
        world_size=world_size,
        workers=config.dataloader_num_workers,
        prefetch=config.dataloader_prefetch_factor,
        state=position,
        allow_changes=config.on_data_change == "allow",
        row_multiple=ROW_MULTIPLE * config.tp_size,
    )
