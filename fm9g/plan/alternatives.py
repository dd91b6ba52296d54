"""Alternatives to a job that does not fit: adapters, smaller models, or more GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from fm9g.config.load import bare_name, config_folders
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.errors import UserError
from fm9g.hardware import GIB, Gpu
from fm9g.model.counts import count_weights
from fm9g.plan.estimate import JobEstimate, estimate_job
from fm9g.plan.job import JobConfig

_LORA = ("project_q", "project_v")  # as in Hu et al. 2021
_MAX_GPUS = 1024
_GPUS_PER_NODE = 8  # assumed if one machine is not enough


def find_alternatives(model: ModelConfig, job: JobConfig, gpu: Gpu) -> list[str]:
    """Alternatives that fit on such GPUs, a line each."""
    count = min_gpus(model, job, gpu)
    return memory_saving_options(model, job, gpu) + ([f"as it is, on {count} such GPUs"] if count else [])


def memory_saving_options(model: ModelConfig, job: JobConfig, gpu: Gpu, keys: str = "") -> list[str]:
    """Alternatives that fit on the same GPUs: LoRA, QLoRA, and the largest smaller model, a line each.

    A model of less than a tenth of the size is not offered.

    Args:
        keys: changes that the job contains already.
    """
    lines = []
    adapters = replace(job, lora_layer=job.lora_layer or _LORA, tp_size=1)
    words = "" if job.lora_layer else f" --lora_layer {','.join(_LORA)}"
    alternatives = [] if job.lora_layer else [("LoRA", words, adapters)]
    if job.quantization == "none":
        alternatives.append(("QLoRA", f"{words} --quantization nf4", replace(adapters, quantization="nf4")))
    min_needed = float("inf")
    for name, own, alternative in alternatives:
        fit = _first_fit(model, alternative, gpu)
        if fit and fit[1].needed < min_needed:  # quantized weights are complete on every GPU, which may need more
            min_needed = fit[1].needed
            lines.append(f"{name} on a pretrained model,{own}{fit[0]}{keys}: {_format_memory(fit[1])}")
    size = count_weights(model)
    smaller = {name: other for name, other in _shipped_models().items() if size / 10 < count_weights(other) < size}
    for name, other in sorted(smaller.items(), key=lambda item: -count_weights(item[1])):
        if fit := _first_fit(other, job, gpu):
            changes = f",{fit[0]}{keys}" if fit[0] or keys else ""
            lines.append(f"a smaller model, such as {name}{changes}: {_format_memory(fit[1])}")
            break
    return lines


def _shipped_models() -> dict[str, ModelConfig]:
    """The models of model_configs/ by name, without invalid files."""
    models = {}
    for folder in reversed(config_folders("model_configs")):
        for file in sorted(folder.glob("*.json")):
            with contextlib.suppress(UserError):
                models[bare_name(file.name)] = load_model_config(file)
    return models


def min_gpus(model: ModelConfig, job: JobConfig, gpu: Gpu) -> int:
    """Number of such GPUs that the unchanged job needs, tried in powers of two from tp_size; 0: over a thousand."""
    count, node = job.tp_size, max(_GPUS_PER_NODE, job.tp_size)
    while count <= _MAX_GPUS:
        nodes = max(1, count // node)
        if estimate_job(model, replace(job, nodes=nodes, gpus=count // nodes), gpu).fits:
            return count
        count *= 2
    return 0


def _first_fit(model: ModelConfig, job: JobConfig, gpu: Gpu) -> tuple[str, JobEstimate] | None:
    """The first variant of a job that fits: the keys to change in addition, and its estimate; None: none fits."""
    for keys, other in _memory_saving_variants(job, model.num_layers):
        try:
            estimate = estimate_job(model, other, gpu)
        except UserError:  # the heads cannot be divided
            return None
        if estimate.fits:
            return keys, estimate
    return None


def _memory_saving_variants(job: JobConfig, layers: int) -> Iterator[tuple[str, JobConfig]]:
    yield "", job
    keys = ""
    if job.activation_checkpoint != "full" or job.grad_ckpt_num < layers:
        job = replace(job, activation_checkpoint="full", grad_ckpt_num=max(layers, job.grad_ckpt_num))
        keys = " --activation_checkpoint full"
        yield keys, job
    if job.batch_size > 1:
        yield f"{keys} --batch_size 1", replace(job, batch_size=1)


def _format_memory(estimate: JobEstimate) -> str:
    return f"{estimate.needed / GIB:.1f} GiB"
