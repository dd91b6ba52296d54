"""Describes a run: lines for the console, and run.json for reports."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fm9g.config.load import COMMAND_LINE
from fm9g.config.resolved import ResolvedRun
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.mixture_checks import describe_templates
from fm9g.data.load.token_estimates import estimate_mean_tokens
from fm9g.engine.base import Engine
from fm9g.model.counts import count_weights

PINNED_PACKAGES = ("torch", "numpy", "tokenizers")  # all processes need the same versions


def summarize(resolved: ResolvedRun, engine: Engine, mixture: Mixture) -> str:
    """Model, precision, devices, data and tokens per step, a few lines."""
    data = ", ".join(f"{c.task_name} ({size} records)" for c, size in zip(mixture.configs, map(len, mixture.datasets)))
    world_size = resolved.layout.world_size
    devices = str(engine.device)
    if world_size > 1:
        devices = f"{engine.device.type}, {world_size} processes, {resolved.engine}"
    first = f"{count_weights(resolved.run.model):,} parameters, {_DTYPES[resolved.dtype]} on {devices}; data: {data}"
    return "\n".join([first, _tokens_per_step(resolved), *describe_templates(mixture)])


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _tokens_per_step(resolved: ResolvedRun) -> str:
    """Tokens per step as a product of keys, each with its origin unless that is the command line."""
    config, origins, layout = resolved.run.train, resolved.run.origins["train"], resolved.layout
    packs_key = "global_batch_size" if config.global_batch_size else "gradient_accumulation_steps"
    factors = []
    for key in ("batch_size", "max_length", packs_key):
        origin = "" if origins[key] == COMMAND_LINE else f" ({origins[key]})"
        factors.append(f"{key} {getattr(config, key)}{origin}")
    if layout.dp_size > 1 and not config.global_batch_size:
        factors.append(f"{layout.dp_size} replicas of the model")
    at_most = "" if config.packing else "at most "
    return f"{at_most}{resolved.tokens_per_step} tokens per step: {' x '.join(factors)}"


def run_info(resolved: ResolvedRun, mixture: Mixture, validation: Mixture | None, summary: str) -> dict[str, Any]:
    """The content of run.json."""
    shares = zip(mixture.proportions(), estimate_mean_tokens(mixture))
    return {
        "config": resolved.run.to_json(),
        "data": [
            {**dataset, "share": share, "tokens_a_sample": tokens}
            for dataset, (share, tokens) in zip(_dataset_info(mixture), shares)
        ],
        "validation": _dataset_info(validation) if validation else [],
        "summary": summary,
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PINNED_PACKAGES}


def _dataset_info(mixture: Mixture) -> list[dict[str, Any]]:
    return [
        {
            "task": config.task_name,
            "path": config.path,
            "records": len(dataset),
            "template": config.chat_template,
            "loss": config.train_on,
        }
        for config, dataset in zip(mixture.configs, mixture.datasets)
    ]
