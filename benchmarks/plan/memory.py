"""Compares the memory that `fm9g plan` predicts with measurements: `python benchmarks/plan/memory.py [--device cuda]`.

On a CPU: small models, processes over gloo; the report is benchmarks/plan/report.md. On a GPU: one process, models of
up to two billion weights.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from measure import measure_apart

from fm9g.config.model import ModelConfig
from fm9g.plan.job import JobConfig
from fm9g.plan.memory import peak_memory

MIB = 2**20
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
}
LARGE = {
    "vocab_size": 73448,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_layers": 16,
    "num_heads": 16,
    "num_kv_heads": 16,
}


@dataclass(frozen=True)
class Case:
    """Changes of the model above and of the job's defaults."""

    model: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)


FULL, SELECTIVE, FP32 = (
    {"activation_checkpoint": "full"},
    {"activation_checkpoint": "selective"},
    {"half_type": "fp32"},
)
ON_CPU = (
    Case(),
    Case({}, FULL),
    Case({}, FP32),
    Case({"vocab_size": 8000}, FULL | FP32 | {"zero_level": 0}),
    Case({"vocab_size": 8000, "tie_word_embeddings": True}, SELECTIVE | {"zero_level": 2, "max_length": 128}),
    Case({"vocab_size": 3000}, FULL | {"max_length": 1500}),
    Case({"num_layers": 8}, SELECTIVE | {"zero_level": 2, "gradient_accumulation_steps": 2}),
    Case({"num_layers": 8}, {"max_length": 64}),
    Case({"num_layers": 8}, FULL | {"grad_ckpt_num": 3}),
    Case({"hidden_size": 128, "intermediate_size": 1024}, FULL | FP32 | {"max_length": 256, "batch_size": 4}),
    Case({"qkv_bias": True, "dropout": 0.1}, {"max_length": 512}),
    Case({}, {"gpus": 2}),
    Case({"num_layers": 8}, FULL | {"gpus": 2, "max_length": 128}),
    Case({"vocab_size": 4000}, {"gpus": 2, "zero_level": 2}),
    Case({"num_layers": 8}, {"gpus": 2, "zero_level": 0, "max_length": 128, "gradient_accumulation_steps": 2}),
    Case({"num_layers": 8}, {"gpus": 2, "tp_size": 2}),
    Case({"vocab_size": 4000}, {"gpus": 2, "tp_size": 2, "sequence_parallel": False}),
    Case({"vocab_size": 4000}, FULL | {"gpus": 4, "tp_size": 2}),
)
ON_GPU = (
    Case(),
    Case({}, FULL),
    Case({}, SELECTIVE),
    Case({}, FULL | {"zero_level": 2, "gradient_accumulation_steps": 2}),
    Case({"tie_word_embeddings": True}, {"max_length": 8192}),
    Case({"num_kv_heads": 4}, {"max_length": 8192, "batch_size": 2, **FULL}),
    Case({}, FULL | {"offload_optimizer": True}),
    Case({}, {"engine": "bmtrain"}),
    Case({}, FULL | {"engine": "bmtrain"}),
    Case({}, FULL | {"engine": "bmtrain", "zero_level": 2}),
    Case({}, FULL | {"engine": "bmtrain", "offload_optimizer": True}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--flash", action="store_true", help="with cuda: flash-attn is installed")
    parser.add_argument("cases", nargs="*", type=int, help="numbers of cases; default: all")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    cases = ON_GPU if on_gpu else ON_CPU
    print("| case | planned MiB | measured MiB | ratio | peak at | model | job |\n|---|---|---|---|---|---|---|")
    for number in options.cases or range(len(cases)):
        model, job = build(cases[number], on_gpu, options.flash)
        planned, measured = peak_memory(model, job), measure_apart(model, job, options.device)
        print(
            f"| {number} | {planned.total / MIB:.1f} | {measured / MIB:.1f} | {planned.total / measured:.3f} | "
            f"{planned.name} | {words(cases[number].model)} | {words(cases[number].job)} |",
            flush=True,
        )


def build(case: Case, on_gpu: bool, flash: bool) -> tuple[ModelConfig, JobConfig]:
    base = {"max_length": 4096} if on_gpu else {"max_length": 1024}
    return ModelConfig(**{**(LARGE if on_gpu else SMALL), **case.model}), JobConfig(
        **{**base, "flash": flash, **case.job}
    )


def words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


if __name__ == "__main__":
    main()
