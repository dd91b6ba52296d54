"""Tokens per second, MFU and peak memory of the engines: `python benchmarks/engine/throughput.py`.

Each case is a process of its own on one GPU or the CPU: steps on random tokens in full rows, without the first steps.

    torch, bmtrain    fm9g.train.loop with that engine
    bare              the same model with autocast, torch.optim.AdamW and torch's clipping, as in each process of DDP
    transformers      the same, with its Llama of equal shapes

MFU: by the FLOPs of the model (fm9g.plan), at the peak of the GPU that --gpu names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from fm9g.config.load import require_config
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.train import TrainConfig
from fm9g.data.load.packing import Pack, Sample, collate
from fm9g.engine.dist_context import DistContext
from fm9g.hardware import GPUS
from fm9g.model.counts import flops_per_token
from fm9g.model.transformer import FM9G
from fm9g.train.batch import to_batch
from fm9g.train.loop import train
from fm9g.train.model_setup import make_engine, setup_model_and_optimizer
from fm9g.train.state import TrainState
from fm9g.train.timer import StepTimer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """way: torch, bmtrain, bare or transformers. layers: the first ones of the model; 0: all."""

    way: str
    model: str = "tiny"
    layers: int = 0
    dtype: str = "bf16"
    checkpointing: str = "none"
    flash: bool = True
    tokens: int = 4096
    documents: int = 1
    zero_level: int = 3


def cases_on_gpu() -> list[Case]:
    """2b, and 7b with 6 layers, which fit in 80 GB."""
    cases = [Case(way, "tiny") for way in ("torch", "bmtrain", "bare", "transformers")]
    for model, layers in (("2b", 0), ("7b", 6)):
        cases += [Case(way, model, layers) for way in ("torch", "bmtrain", "bare", "transformers")]
        for way in ("torch", "bmtrain"):
            cases += [Case(way, model, layers, checkpointing=kind) for kind in ("selective", "full")]
            cases += [
                Case(way, model, layers, zero_level=2, checkpointing="full"),
                Case(way, model, layers, flash=False),
            ]
            cases += [Case(way, model, layers, documents=8), Case(way, model, layers, documents=8, flash=False)]
        cases += [Case("torch", model, layers, dtype=kind) for kind in ("fp16", "fp32")]
    return cases


def cases_on_cpu() -> list[Case]:
    case = Case("torch", dtype="fp32", tokens=512, flash=False)
    return [
        replace(case, way=way, documents=count) for count in (1, 8) for way in ("torch", "bare", "transformers")
    ] + [replace(case, checkpointing=kind) for kind in ("selective", "full")]


def model_of(case: Case) -> ModelConfig:
    if case.model == "tiny":
        tiny = ModelConfig(vocab_size=8000, hidden_size=256, intermediate_size=704, num_layers=4, num_heads=4)
        return replace(tiny, half_type=case.dtype)
    config = load_model_config(require_config("model_configs", case.model))
    return replace(config, num_layers=case.layers or config.num_layers, half_type=case.dtype)


def packs(case: Case, vocabulary: int, step: int) -> list[Pack]:
    """A row of documents of equal length, a target at every position."""
    rng, length = np.random.default_rng(step), case.tokens // case.documents
    samples = [Sample(rng.integers(0, vocabulary, length + 1).astype(np.int32), 0, i, 0) for i in range(case.documents)]
    return [collate(samples, case.tokens)]


class Loader:
    is_infinite = True

    def __init__(self, case: Case, vocabulary: int, count: int) -> None:
        self._packs = [packs(case, vocabulary, step) for step in range(min(count, 4))]  # not measured
        self._step = 0
        self.times: list[float] = []

    def next_batch(self) -> list[Pack]:
        if torch.cuda.is_available() and self._step == WARM:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self._step += 1
        return self._packs[self._step % len(self._packs)]


WARM = 3


def run_loop(case: Case, model: ModelConfig, steps: int, device: str) -> float:
    """Seconds per step of fm9g.train.loop."""
    settings: dict[str, Any] = {"engine": case.way, "device": device, "zero_level": case.zero_level}
    config = TrainConfig(
        config="",
        train_iters=steps + WARM,
        log_iters=10_000,  # only at the last step
        warmup_iters=1,
        lr=1e-4,
        max_length=case.tokens,
        activation_checkpoint=case.checkpointing,
        grad_ckpt_num=model.num_layers,
        flash="cuda" if case.flash else "none",
        **settings,
    )
    with DistContext(device) as dist_context:
        engine = make_engine(config, dist_context)
        with mock.patch("fm9g.train.model_setup.has_fast_bf16", return_value=True):
            setup_model_and_optimizer(engine, config, model, None)
        loader: Any = Loader(case, model.vocab_size, steps + WARM)
        train(config, ["all"], engine, loader, TrainState(0, np.zeros(1, np.int64)), [], StepTimer())
        synchronize()
        return (time.perf_counter() - loader.times[WARM]) / steps


def run_bare(case: Case, model: ModelConfig, steps: int, device: str) -> float:
    """Seconds per step of plain torch, with our model or the class of transformers."""
    dtype = DTYPES[case.dtype]
    with torch.device(device):
        plain: torch.nn.Module = transformers_model(model, case) if case.way == "transformers" else FM9G(model)
    if case.way == "bare":
        for name, weight in plain.named_parameters():
            plain.init_weight(name, weight, 1)  # type: ignore[operator]
    plain.train()
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-4, (0.9, 0.95), 1e-8, weight_decay=0.1, fused=True)
    loader, target = Loader(case, model.vocab_size, steps + WARM), torch.device(device)
    for _ in range(steps + WARM):
        (pack,) = loader.next_batch()
        batch, _ = to_batch(pack, target)
        with torch.autocast(target.type, dtype) if dtype != torch.float32 else nullcontext():
            if case.way == "bare":
                loss = plain(batch)[0] / len(batch.targets)
            else:  # one batch of documents of equal length
                ids = batch.input_ids.long().view(case.documents, -1)
                loss = plain(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronize()
    return (time.perf_counter() - loader.times[WARM]) / steps


def transformers_model(model: ModelConfig, case: Case) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            attn_implementation="sdpa",
            tie_word_embeddings=model.tie_word_embeddings,
        )
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(case: Case, steps: int, device: str, gpu: str) -> dict[str, Any]:
    model = model_of(case)
    seconds = (run_loop if case.way in ("torch", "bmtrain") else run_bare)(case, model, steps, device)
    speed = case.tokens / seconds
    flops = flops_per_token(model, case.tokens // case.documents)
    on_gpu = device == "cuda"
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops / GPUS[gpu].flops if on_gpu else None,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gpu", default="A100", choices=sorted(GPUS), help="its peak FLOPs are those of the MFU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
        print(json.dumps(measure(Case(**json.loads(options.case)), options.steps, options.device, options.gpu)))
        return
    print("| way | model | dtype | checkpointing | flash | documents x tokens | tokens/s | MFU | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases_on_gpu() if options.device == "cuda" else cases_on_cpu():
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--case",
            json.dumps(vars(case)),
            "--device",
            options.device,
        ]
        command += ["--gpu", options.gpu, "--steps", str(options.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            columns = f"failed: {reason[:100]} | | "
        else:
            result = json.loads(done.stdout.splitlines()[-1])
            mfu, gib = ("" if result[key] is None else f"{result[key]:.3f}" for key in ("mfu", "gib"))
            columns = f"{result['tokens_per_second']:,.0f} | {mfu} | {gib}"
        way = case.way + (f", ZeRO-{case.zero_level}" if case.way in ("torch", "bmtrain") else "")
        model = f"{case.model}{f', {case.layers} layers' if case.layers else ''}"
        shape = f"{case.documents} x {case.tokens // case.documents}"
        flash = "yes" if case.flash else "no"
        print(
            f"| {way} | {model} | {case.dtype} | {case.checkpointing} | {flash} | {shape} | {columns} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
