"""Measures the peak memory of a training process: torch's counter on a GPU, allocator events on a CPU."""

from __future__ import annotations

import gc
import itertools
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fm9g.config.fields import keys_of
from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig
from fm9g.engine.dist_context import DistContext
from fm9g.io.pt_file import write_weights
from fm9g.model.transformer import Batch, weight_shapes
from fm9g.plan.job import RUN_KEYS, JobConfig
from fm9g.train.model_setup import make_engine, setup_model_and_optimizer

_MARK = 98_765  # bytes of a tensor whose allocation marks the first step


def measure(
    model: ModelConfig,
    job: JobConfig,
    device: str = "cpu",
    rank: int = 0,
    store: dist.Store | None = None,
    steps: int = 1,
) -> float:
    """Peak bytes of this process, one of those of the job, over `steps` steps."""
    gc.collect()  # else another model's memory would be freed during the measurement
    ranks = job.nodes * job.gpus
    with DistContext(device, rank, ranks, rank, ranks, store) as dist_context:
        if device == "cuda":
            _train(model, job, dist_context, steps, torch.cuda.reset_peak_memory_stats)
            return torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            _train(model, job, dist_context, steps, lambda: torch.empty(_MARK, dtype=torch.uint8))
        assert profile.profiler is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(list(itertools.accumulate(changes))[changes.index(_MARK) :])


def _train(
    model: ModelConfig, job: JobConfig, dist_context: DistContext, steps: int, mark: Callable[[], object]
) -> None:
    """Trains on random tokens as fm9g.train.loop does; calls `mark` once the model is built."""
    values = {
        name: getattr(job, name)
        for name in (*RUN_KEYS, "engine", "activation_checkpoint", "gradient_accumulation_steps")
    } | {"flash": "cuda" if job.flash else "none"}
    with (
        mock.patch("fm9g.train.model_setup.has_fast_bf16", return_value=True),  # memory is the same where it is slow
        tempfile.TemporaryDirectory() as folder,
    ):
        if job.lora_layer:
            base = Path(folder) / "base.pt"
            weights = {name: torch.empty(shape).normal_(0, 0.02) for name, shape in weight_shapes(model).items()}
            write_weights(base, weights, weights.items())
            values |= {"lora_layer": list(job.lora_layer), "modules_to_save": list(job.modules_to_save)}
            values["pretrained_model"] = str(base)
            del weights
        config = TrainConfig(**values)
        engine = make_engine(config, dist_context)
        setup_model_and_optimizer(engine, config, replace(model, half_type=job.half_type), None)
    gc.collect()
    mark()
    for step in range(steps):
        for number in range(job.gradient_accumulation_steps):
            dropout_seed = (step * job.gradient_accumulation_steps + number) * engine.dp_size + engine.dp_rank
            batch = _batch(model.vocab_size, job, dropout_seed, engine.device)
            loss, _ = engine.forward(batch, dropout_seed)
            engine.backward(loss / job.tokens_per_step, number + 1 == job.gradient_accumulation_steps)
            del loss, batch
        engine.step(1e-3, 1.0)


def _batch(vocab_size: int, job: JobConfig, seed: int, device: torch.device) -> Batch:
    """A row of documents of max_length tokens each, with a target at every position."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (job.row + 1,), generator=generator).to(device)
    rows = torch.arange(job.row, device=device)
    borders = torch.arange(job.batch_size + 1, dtype=torch.int32, device=device) * job.max_length
    return Batch(ids[:-1], rows % job.max_length, borders, [job.max_length] * job.batch_size, rows, ids[1:])


def measure_apart(model: ModelConfig, job: JobConfig, device: str = "cpu") -> float:
    """As `measure`, in new processes; returns the largest of their peaks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    work = json.dumps({"model": model.to_json(), "job": asdict(job)})
    command = [sys.executable, __file__, work, device, port]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(job.nodes * job.gpus)
    ]
    outputs = [rank.communicate() for rank in ranks]
    if failed := [errors for rank, (_, errors) in zip(ranks, outputs) if rank.returncode]:
        raise RuntimeError(f"a process failed:\n{failed[0]}")
    return max(float(output.splitlines()[-1]) for output, _ in outputs)


def _main(work: str, device: str, port: str, rank: str) -> None:
    torch.set_num_threads(1)
    given = json.loads(work)
    attributes = {key: field.name for key, field in keys_of(ModelConfig).items()}
    model = ModelConfig(**{attributes[key]: value for key, value in given["model"].items() if key in attributes})
    job = JobConfig(**given["job"])
    store = dist.TCPStore("127.0.0.1", int(port), job.nodes * job.gpus, is_master=rank == "0")
    print(measure(model, job, device, int(rank), store))


if __name__ == "__main__":
    _main(*sys.argv[1:])
