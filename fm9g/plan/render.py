"""An estimate as a table, and alternatives as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from fm9g.hardware import GIB
from fm9g.io.atomic import atomic_file
from fm9g.plan.estimate import JobEstimate
from fm9g.plan.job import JobConfig
from fm9g.plan.memory import COMPONENTS
from fm9g.text_table import text_table

_MEANING = {
    "weights": "this GPU's part",
    "gradients": "this GPU's part",
    "optimizer": "moments of weights, and fp32 copies where the engine has them",
    "activations": "saved for the backward pass, and its temporary values",
    "loss": "a chunk of logits, gradient of the output layer",
    "buffers": "gathered weights, gradients in reduction",
}


def format_table(estimate: JobEstimate) -> str:
    """The components of the peak, then disk and speed."""
    job, memory = estimate.job, estimate.memory
    rows = [(name, f"{getattr(memory, name) / GIB:.2f} GiB", _MEANING[name]) for name in COMPONENTS]
    rows += [
        ("tensors", f"{memory.total / GIB:.2f} GiB", f"at the peak: {memory.name}"),
        ("CUDA, NCCL, gaps", f"{estimate.overhead / GIB:.2f} GiB", "assumed"),
        (
            "free" if estimate.fits else "missing",
            f"{abs(estimate.free) / GIB:.2f} GiB",
            f"of {estimate.gpu.memory:g} GiB",
        ),
        ("", "", ""),
        ("parameters", f"{estimate.weights / 1e9:.3f} B", f"{job.engine}, {job.half_type}"),
        *_adapters(estimate),
        ("checkpoint", f"{estimate.checkpoint / GIB:.1f} GiB", f"on disk, in fp32: {_saved(job)}"),
        ("tokens per step", f"{job.tokens_per_step:,}", _product(estimate)),
        (
            "FLOPs per token",
            f"{estimate.flops_per_token:.3g}",
            f"forward and backward, texts of {job.max_length} tokens",
        ),
        (
            "tokens per second",
            f"{estimate.tokens_per_second:,.0f}",
            f"MFU {estimate.mfu:g} (assumed) of {estimate.gpu.flops / 1e12:g} TFLOPS per GPU",
        ),
    ]
    return "\n".join(text_table(rows, right=[1]))


def _adapters(estimate: JobEstimate) -> list[tuple[str, str, str]]:
    job, trained = estimate.job, estimate.job.adapters(estimate.model) * estimate.model.num_layers
    if not trained:
        return []
    trained += job.saved_modules(estimate.model)
    saved = "".join(f", {name} in full" for name in job.modules_to_save)
    bits = "" if job.quantization == "none" else f", the base in {job.quantization}, unsharded on every GPU"
    return [
        (
            "trained",
            f"{trained / 1e6:.3f} M",
            f"adapters of rank {job.lora_r}{saved}, {trained / estimate.weights:.2%}{bits}",
        )
    ]


def _saved(job: JobConfig) -> str:
    weights = "adapters" if job.lora_layer else "weights"
    mean = " and their running mean" if job.ema_decay else ""
    return weights + mean + ("" if job.save_model_only else f" and the state of {job.optimizer}")


def format_verdict(estimate: JobEstimate, device: str, tokens: float | None, why: str) -> str:
    """One line: whether the job fits, and how long the run takes.

    Args:
        device: name of the GPU.
        tokens: tokens of the run; None: unknown.
        why: the key that sets the number of tokens, or the reason why it is unknown.
    """
    job, count = estimate.job, estimate.job.nodes * estimate.job.gpus
    fits = "It fits" if estimate.fits else "It does not fit"
    line = f"{fits}: {estimate.needed / GIB:.1f} of the {estimate.gpu.memory:g} GiB of each {device} "
    line += "(assumed, not measured). "
    if tokens is None:
        return line + f"How long the run takes is unknown: {why}."
    steps = math.ceil(tokens / job.tokens_per_step)
    what = f"{steps:,} step{'s' * (steps != 1)} of {job.tokens_per_step:,} tokens ({why}, {_count(tokens)} tokens)"
    would = "take" if estimate.fits else "would take"
    days = _duration(estimate.days(tokens))
    return line + f"{what} {would} about {days} on {count} x {device} at an MFU of {estimate.mfu:g} (assumed)."


def _count(tokens: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:,.0f}"


def _duration(days: float) -> str:
    for unit, length in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * length >= 1:
            return f"{days * length:,.1f} {unit}"
    return "a minute"


def _product(estimate: JobEstimate) -> str:
    job = estimate.job
    return (
        f"{job.data_parallel} replica{'s' * (job.data_parallel > 1)} "
        f"x gradient_accumulation_steps {job.gradient_accumulation_steps} "
        f"x batch_size {job.batch_size} x max_length {job.max_length}"
    )


def format_suggestions(fitting: list[tuple[str, JobEstimate]], ways: list[str]) -> str:
    """The changes with which the job fits, with memory and speed; without any, other ways to make it fit.

    Args:
        fitting: changes and the plan with them, from `suggest`, fastest first.
        ways: alternatives beyond the keys that `suggest` tries.
    """
    if not fitting:
        none = "No zero_level, activation_checkpoint, tp_size, offload_optimizer or batch_size makes it fit."
        lines = ways or ["a shorter max_length, or larger GPUs"]
        return "\n".join([none, "What would fit:", *(f"  {line}" for line in lines)])
    lines = ["What would fit, with the same tokens per step, fastest by estimate first:"]
    for changes, other in fitting:
        slower = other.step_seconds / fitting[0][1].step_seconds
        pace = "" if slower < 1.005 else f", {slower:.2f} x the time of the first"
        lines.append(f"  {changes}: {other.needed / GIB:.1f} GiB{pace}")
    return "\n".join(lines)


def plot_memory(estimates: dict[str, JobEstimate], picture: Path) -> None:
    """Draws the memory of each plan as a bar of components, with the GPU's memory as a limit.

    Args:
        estimates: label -> plan.
        picture: the file to write; its suffix, one of fm9g.io.output.IMAGE_SUFFIXES, selects the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [label.replace(" --", "\n--") for label in estimates]  # one change per line
    figure = Figure(figsize=(10, 1.6 + 0.25 * len("\n\n".join(labels).split("\n"))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = [0.0] * len(estimates)
    for component in COMPONENTS:
        sizes = [getattr(estimate.memory, component) / GIB for estimate in estimates.values()]
        axes.barh(labels, sizes, left=start, label=component)
        start = [a + b for a, b in zip(start, sizes)]
    rest = [estimate.needed / GIB - offset for estimate, offset in zip(estimates.values(), start)]
    axes.barh(labels, rest, left=start, label="CUDA, NCCL, gaps", color="lightgrey")
    limit = next(iter(estimates.values())).gpu.memory
    axes.axvline(limit, color="black", linestyle="--", label=f"{limit:g} GiB")
    axes.set(xlabel="GiB per GPU at the peak")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:].lower(), dpi=120)
