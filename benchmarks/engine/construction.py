"""The memory that one rank of many needs to build a model: `python benchmarks/engine/construction.py --engine torch`.

The process is rank 0, which initializes or reads each full weight. The other ranks do not exist, and their messages are
empty: for torch by its fake process group, for bmtrain by tools/bmtrain_over_gloo.py. All tensors are in the host's
memory, so the result is the peak of the resident set, above that before. On a GPU the same tensors are on the device.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from fm9g.config.load import require_config
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.train import TrainConfig
from fm9g.engine.base import Engine
from fm9g.engine.dist_context import DistContext
from fm9g.model.counts import count_weights
from fm9g.train.model_setup import make_engine, setup_model_and_optimizer

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9


class FirstRank(DistContext):
    """Rank 0 of a number of processes of which the others do not exist."""

    def __init__(self, ranks: int) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.rank, self.world_size, self.local_rank, self.local_world_size = 0, ranks, 0, 1
        self.store, self.device = dist.HashStore(), torch.device("cpu")
        return_freed_memory()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def return_freed_memory() -> None:
    """Makes glibc return freed blocks to the system at once, so that resident memory is memory in use."""
    mmap_threshold, trim_threshold = -3, -1  # options of mallopt(3)
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 2**16)
    mallopt(trim_threshold, 0)


def scaled(config: ModelConfig, scale: float) -> ModelConfig:
    """A model with the same layers and heads; all widths and the vocabulary are multiplied by scale."""

    def times(size: int) -> int:
        return max(2, 2 * round(size * scale / 2))

    width = max(4, times(config.head_dim))
    return replace(
        config,
        vocab_size=times(config.vocab_size),
        hidden_size=width * config.hidden_size // config.head_dim,
        intermediate_size=times(config.intermediate_size),
        head_dim=width,
    )


def build(engine: str, config: ModelConfig, ranks: int, zero_level: int, after_sharding: Any = None) -> Engine:
    """An engine with the model, as in `fm9g train`. after_sharding: called before the optimizer is created."""
    settings = TrainConfig(config="", engine=engine, device="cpu", zero_level=zero_level)
    if engine == "bmtrain":
        sys.path.append(str(ROOT))
        from tools import bmtrain_over_gloo

        bmtrain_over_gloo.install_absent_peers(ranks)
    built = make_engine(settings, FirstRank(ranks))
    shard_model = built._shard_model

    def shard_and_report(*arguments: Any) -> torch.nn.Module:
        model = shard_model(*arguments)
        if after_sharding:
            after_sharding()
        return model

    with (
        mock.patch.object(built, "_shard_model", shard_and_report),
        mock.patch("fm9g.train.model_setup.has_fast_bf16", return_value=True),  # memory does not depend on speed
    ):
        setup_model_and_optimizer(built, settings, config, None)
    return built


def resident(key: str) -> int:
    """VmRSS, or VmHWM, its peak since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextmanager
def own_group() -> Iterator[None]:
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(engine: str, config: ModelConfig, ranks: int, zero_level: int) -> dict[str, float]:
    """Bytes and seconds of building a model.

    full: the model's weights in fp32. peak: of the memory above the start, until the model is distributed and
    initialized; ratio: of peak to full. with_optimizer: the peak until masters and moments exist too.
    """
    small = scaled(replace(config, num_layers=1), 1 / 64)
    with own_group():
        build(engine, small, ranks, zero_level)  # loads libraries, which do not count
    gc.collect()
    start, start_time, peaks = resident("VmRSS"), time.monotonic(), []
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with own_group():
        built = build(engine, config, ranks, zero_level, lambda: peaks.append(resident("VmHWM")))
        peaks.append(resident("VmHWM"))
    del built
    full = 4 * count_weights(config)
    return {
        "full": full,
        "peak": peaks[0] - start,
        "ratio": (peaks[0] - start) / full,
        "with_optimizer": peaks[1] - start,
        "seconds": time.monotonic() - start_time,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="torch", choices=["torch", "bmtrain"])
    parser.add_argument("--config", default="7b", help="a name in model_configs/, or a path (%(default)s)")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--zero-level", type=int, default=3, choices=[2, 3])
    parser.add_argument("--scale", type=float, default=1.0, help="of all widths and the vocabulary (%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = scaled(load_model_config(require_config("model_configs", options.config)), options.scale)
    result = measure(options.engine, config, options.ranks, options.zero_level)
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{options.engine}, rank 0 of {options.ranks}, {count_weights(config):,} weights: full model in fp32 "
        f"{result['full'] / GB:.2f} GB, peak {result['peak'] / GB:.2f} GB, ratio {result['ratio']:.3f}; with optimizer "
        f"{result['with_optimizer'] / GB:.2f} GB; {result['seconds']:.0f} s, {os.cpu_count()} processors"
    )


if __name__ == "__main__":
    main()
