"""The memory that one rank of many takes to build a model: `python benchmarks/engine/construction.py --engine torch`.

The process is rank 0, which makes or reads every weight whole, and the others are feigned: their messages carry
nothing. For torch that is its fake process group; for bmtrain the stand-in of the tests, with a communicator of one.
Everything is in the host's memory, so the figure is the process's largest resident set above the one before. On a GPU
the same tensors are on the device.
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
from fm9g.plan.sizes import count_weights
from fm9g.train.model_setup import make_engine, setup_model_and_optimizer

GB = 1e9


class FirstRank(DistContext):
    """Rank 0 of `ranks` processes that are not there."""

    def __init__(self, ranks: int) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.rank, self.world_size, self.local_rank, self.local_world_size = 0, ranks, 0, 1
        self.store, self.device = dist.HashStore(), torch.device("cpu")
        return_freed_memory()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def feign_bmtrain(ranks: int) -> None:
    """Lets bmtrain run on a CPU as rank 0 of `ranks`; what others would send is a copy of this rank's."""
    for folder in ("tests", "tests/engine"):
        sys.path.append(str(Path(__file__).resolve().parents[2] / folder))
    from helpers import bmtrain_over_gloo

    torch.utils._device._device_constructors()  # torch.device("meta") remembers them before they are replaced
    bmtrain_over_gloo.install()
    compiled: Any = bmtrain_over_gloo._compiled

    def all_gather(source: int, target: int, count: int, dtype: int, *_: Any) -> None:
        part = bmtrain_over_gloo._bytes(source, count, dtype)
        bmtrain_over_gloo._bytes(target, count * ranks, dtype).view(ranks, -1).copy_(part)

    def copy(source: int, target: int, count: int, dtype: int, *_: Any) -> None:
        bmtrain_over_gloo._bytes(target, count, dtype).copy_(bmtrain_over_gloo._bytes(source, count, dtype))

    compiled.ncclGetUniqueId = lambda: b""
    compiled.ncclCommInitRank = compiled.ncclCommUserRank = lambda *_: 0
    compiled.ncclCommCount = lambda _: ranks
    compiled.ncclAllGather, compiled.ncclAllReduce, compiled.ncclBroadcast = all_gather, copy, copy


def return_freed_memory() -> None:
    """Has glibc return freed blocks to the system at once, so that what is resident is what is in use."""
    mmap_threshold, trim_threshold = -3, -1  # options of mallopt(3)
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 2**16)
    mallopt(trim_threshold, 0)


def scaled(config: ModelConfig, scale: float) -> ModelConfig:
    """A model of the same layers and heads, all widths and the vocabulary multiplied by scale."""

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
    """An engine with the model, as `fm9g train` makes it. after_sharding: called before the optimizer is made."""
    settings = TrainConfig(config="", engine=engine, device="cpu", zero_level=zero_level)
    if engine == "bmtrain":
        feign_bmtrain(ranks)
    made = make_engine(settings, FirstRank(ranks))
    shard_model = made._shard_model

    def shard_and_report(*arguments: Any) -> torch.nn.Module:
        model = shard_model(*arguments)
        if after_sharding:
            after_sharding()
        return model

    with (
        mock.patch.object(made, "_shard_model", shard_and_report),
        mock.patch("fm9g.train.model_setup.has_fast_bf16", return_value=True),  # memory is the same where it is slow
    ):
        setup_model_and_optimizer(made, settings, config, None)
    return made


def resident(key: str) -> int:
    """VmRSS or VmHWM, the largest since the mark, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextmanager
def own_group() -> Iterator[None]:
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(engine: str, config: ModelConfig, ranks: int, zero_level: int) -> dict[str, float]:
    """Bytes: whole (the model's weights in fp32), peak (above the start, until the model is placed and filled), with
    optimizer (until masters and moments are there, too); and seconds."""
    small = scaled(replace(config, num_layers=1), 1 / 64)
    with own_group():
        build(engine, small, ranks, zero_level)  # libraries are loaded, and not counted
    gc.collect()
    start, began, peaks = resident("VmRSS"), time.monotonic(), []
    Path("/proc/self/clear_refs").write_text("5")  # the mark
    with own_group():
        made = build(engine, config, ranks, zero_level, lambda: peaks.append(resident("VmHWM")))
        peaks.append(resident("VmHWM"))
    del made
    whole = 4 * count_weights(config)
    return {
        "whole": whole,
        "peak": peaks[0] - start,
        "ratio": (peaks[0] - start) / whole,
        "with_optimizer": peaks[1] - start,
        "seconds": time.monotonic() - began,
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
    config = scaled(load_model_config(require_config("model_configs", options.config)).value, options.scale)
    found = measure(options.engine, config, options.ranks, options.zero_level)
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"{options.engine}, rank 0 of {options.ranks}, {count_weights(config):,} weights: whole in fp32 "
        f"{found['whole'] / GB:.2f} GB, peak {found['peak'] / GB:.2f} GB, ratio {found['ratio']:.3f}; with optimizer "
        f"{found['with_optimizer'] / GB:.2f} GB; {found['seconds']:.0f} s, {os.cpu_count()} processors"
    )


if __name__ == "__main__":
    main()
